"""Log-probabilities in the formats of the two APIs."""

from collections.abc import Iterator, Sequence

from rayserve_sarathi.openai.generation import PlacedLogprobs
from rayserve_sarathi.request import TokenLogprobs
from rayserve_sarathi.text.tokenizer import Tokenizer

_MIN_LOGPROB = -9999.0
"""Stands for minus infinity, which JSON does not know."""


def chat_logprobs(tokenizer: Tokenizer, logprobs: Sequence[PlacedLogprobs]) -> dict[str, object]:
    """Return the `logprobs` of a chat completion's choice."""
    return {
        "content": [
            {
                **_chat_token(tokenizer, entry.token_id, entry.logprob),
                "top_logprobs": [
                    _chat_token(tokenizer, token_id, logprob)
                    for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
                ],
            }
            for entry, _ in logprobs
        ],
        "refusal": None,
    }


def _chat_token(tokenizer: Tokenizer, token_id: int, logprob: float) -> dict[str, object]:
    token = tokenizer.token_bytes(token_id)
    return {"token": token.decode(errors="replace"), "logprob": max(logprob, _MIN_LOGPROB), "bytes": list(token)}


def completion_logprobs(
    tokenizer: Tokenizer,
    logprobs: Sequence[PlacedLogprobs],
    *,
    prompt_token_ids: Sequence[int] = (),
    prompt_logprobs: Sequence[TokenLogprobs] = (),
    echo: str = "",
) -> dict[str, object]:
    """Return the `logprobs` of a completion's choice.

    Args:
        logprobs: Of the generated tokens.
        prompt_token_ids: The prompt, if it is echoed; the first token of a prompt has no log-probability.
        prompt_logprobs: Of the prompt's other tokens.
        echo: The prompt's text, if it is part of the choice's.
    """
    entries: list[tuple[int, TokenLogprobs | None]] = []
    entries += zip(_prompt_offsets(tokenizer, prompt_token_ids, echo), [None, *prompt_logprobs], strict=False)
    entries += [(len(echo) + offset, entry) for entry, offset in logprobs]
    token_ids = [*prompt_token_ids[:1], *(entry.token_id for _, entry in entries if entry is not None)]
    return {
        "tokens": [completion_token(tokenizer, token_id) for token_id in token_ids],
        "token_logprobs": [None if entry is None else max(entry.logprob, _MIN_LOGPROB) for _, entry in entries],
        "top_logprobs": [None if entry is None else _completion_top(tokenizer, entry) for _, entry in entries],
        "text_offset": [offset for offset, _ in entries],
    }


def completion_token(tokenizer: Tokenizer, token_id: int) -> str:
    """Return a token as the completions API writes it: its text, or its bytes if they are no text by themselves."""
    token = tokenizer.token_bytes(token_id)
    try:
        return token.decode()
    except UnicodeDecodeError:
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token)


def _completion_top(tokenizer: Tokenizer, entry: TokenLogprobs) -> dict[str, float]:
    top = {
        completion_token(tokenizer, token_id): max(logprob, _MIN_LOGPROB)
        for token_id, logprob in zip(entry.top_token_ids, entry.top_logprobs, strict=True)
    }
    top.setdefault(completion_token(tokenizer, entry.token_id), max(entry.logprob, _MIN_LOGPROB))
    return top


def _prompt_offsets(tokenizer: Tokenizer, token_ids: Sequence[int], echo: str) -> Iterator[int]:
    detokenizer = tokenizer.detokenizer(skip_special_tokens=False)
    offset = 0
    for token_id in token_ids:
        yield offset
        text = detokenizer.push(token_id)
        # A special token that the tokenizer put in front, or that is not shown, takes no place.
        if not tokenizer.is_special(token_id) or echo.startswith(text, offset):
            offset += len(text)
