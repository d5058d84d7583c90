"""`/v1/completions`: text, or tokens, that the model goes on with."""

import uuid
from collections.abc import Sequence

from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.openai.answers import JsonObject, Plan
from rayserve_sarathi.openai.generation import ChoiceDelta
from rayserve_sarathi.openai.logprobs import completion_logprobs
from rayserve_sarathi.openai.prompts import PromptTokens, RequestPlanner, check_prompt_logprobs
from rayserve_sarathi.openai.protocol import CompletionRequest, StreamOptions
from rayserve_sarathi.text.tokenizer import Tokenizer

_DEFAULT_MAX_TOKENS = 16


class CompletionFormat:
    """A choice of `/v1/completions`, whole or in chunks.

    Args:
        echoes: The text to begin each prompt's choices with; None without `echo`.
    """

    object_name = "text_completion"
    chunk_object_name = "text_completion"

    def __init__(
        self,
        tokenizer: Tokenizer,
        prompts: Sequence[PromptTokens],
        *,
        num_choices_per_prompt: int,
        echoes: Sequence[str] | None,
        has_logprobs: bool,
    ) -> None:
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._num_choices_per_prompt = num_choices_per_prompt
        self._echoes = echoes
        self._has_logprobs = has_logprobs

    def choice(self, delta: ChoiceDelta) -> JsonObject:
        """See `ChoiceFormat`."""
        return self.chunk_choice(delta, is_first=True)

    def chunk_choice(self, delta: ChoiceDelta, *, is_first: bool) -> JsonObject:
        """See `ChoiceFormat`."""
        echo = "" if self._echoes is None else self._echoes[delta.choice_index // self._num_choices_per_prompt]
        return {
            "index": delta.choice_index,
            "text": echo + delta.text if is_first else delta.text,
            "logprobs": self._logprobs(delta, echo, is_first=is_first) if self._has_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }

    def _logprobs(self, delta: ChoiceDelta, echo: str, *, is_first: bool) -> JsonObject:
        is_echoed = is_first and self._echoes is not None
        prompt = self._prompts[delta.choice_index // self._num_choices_per_prompt]
        return completion_logprobs(
            self._tokenizer,
            delta.logprobs,
            prompt_token_ids=prompt.token_ids if is_echoed else (),
            prompt_logprobs=delta.prompt_logprobs if is_echoed else (),
            echo=echo,
        )


async def plan_completion(
    request: CompletionRequest, planner: RequestPlanner, tokenizer: Tokenizer, *, model: str, created: int, tenant: str
) -> Plan:
    """Tokenise the prompts and lay out their choices.

    Raises:
        InvalidRequestError: A prompt does not fit the model.
    """
    has_echo = request.echo is True
    if request.num_tokens_asked == 0 and not has_echo:
        raise InvalidRequestError("max_tokens must be at least 1 without echo, got 0", param="max_tokens")
    prompts = await planner.tokenize(request.prompts, add_special_tokens=request.add_special_tokens is not False)
    answer_id = f"cmpl-{uuid.uuid4().hex}"
    choices = [
        choice
        for place, prompt in enumerate(prompts)
        for choice in planner.choices(
            request,
            prompt,
            id_prefix=f"{answer_id}-{place}",
            max_tokens=planner.fit_max_tokens(prompt, asked=request.num_tokens_asked, default=_DEFAULT_MAX_TOKENS),
            logprobs=request.logprobs,
            prompt_logprobs=request.logprobs if has_echo else None,
            tenant=tenant,
        )
    ]
    check_prompt_logprobs(choices)
    choice_format = CompletionFormat(
        tokenizer,
        prompts,
        num_choices_per_prompt=request.num_choices,
        echoes=[
            _echo(tokenizer, prompt, skip_special_tokens=request.skip_special_tokens is not False) for prompt in prompts
        ]
        if has_echo
        else None,
        has_logprobs=request.logprobs is not None,
    )
    return Plan(
        answer_id=answer_id,
        created=created,
        model=model,
        prompts=prompts,
        choices=choices,
        choice_format=choice_format,
        stream_options=request.stream_options or StreamOptions(),
    )


def _echo(tokenizer: Tokenizer, prompt: PromptTokens, *, skip_special_tokens: bool) -> str:
    if prompt.text is not None:
        return prompt.text
    return tokenizer.decode(prompt.token_ids, skip_special_tokens=skip_special_tokens)
