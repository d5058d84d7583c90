"""Which fields of a body are read, which may be there, and which are refused.

The one rule, chosen from what the official `openai` client, langchain-openai, litellm, lm-eval, `vllm bench serve`,
aiperf and guidellm send: a field that we implement is validated (`protocol`); a field that cannot change the answer is
ignored; a field of OpenAI's or vLLM's that would change it, and that we do not implement, may only have the value that
means "off"; every other field is refused with the nearest valid name, since a setting that is silently ignored (a
misspelt `temperatur`) costs its user more than an error. `null` is "off" for every field that is known. Of equal keys
in one body the last one counts, as in Python and JavaScript.
"""

import difflib
from collections.abc import Collection, Mapping

from rayserve_sarathi.openai.errors import UnsupportedParameterError

IGNORED_FIELDS = frozenset(
    {
        "include_reasoning",
        "metadata",
        "parallel_tool_calls",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "request_id",
        "safety_identifier",
        "service_tier",
        "user",
    }
)

OFF_VALUES: Mapping[str, tuple[object, ...]] = {
    "allowed_token_ids": ([],),
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "detokenize": (True,),
    "documents": ([],),
    "early_stopping": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "kv_transfer_params": (),
    "length_penalty": (1, 1.0),
    "logits_processors": ([],),
    "mm_processor_kwargs": (),
    "modalities": (["text"],),
    "moderation": (),
    "prediction": (),
    "priority": (0,),
    "prompt_embeds": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "repetition_detection": (),
    "response_format": ({"type": "text"},),
    "return_token_ids": (False,),
    "return_tokens_as_token_ids": (False,),
    "spaces_between_special_tokens": (True,),
    "store": (False,),
    "structured_outputs": (),
    "suffix": ("",),
    "thinking_token_budget": (),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "truncate_prompt_tokens": (),
    "use_beam_search": (False,),
    "verbosity": ("medium",),
    "web_search_options": (),
}
"""What each field that we do not implement may be, beside null."""

MESSAGE_OFF_VALUES: Mapping[str, tuple[object, ...]] = {
    "annotations": ([],),
    "audio": (),
    "function_call": (),
    "reasoning": (),
    "reasoning_content": (),
    "refusal": (),
    "tool_call_id": (),
    "tool_calls": ([],),
    "type": ("text", "message"),  # lm-eval
}
"""The same for the fields of a message, so that an answer's message can be sent back as it is."""


def keep_known_fields(
    body: Mapping[str, object],
    known: Collection[str],
    *,
    ignored: Collection[str] = IGNORED_FIELDS,
    off_values: Mapping[str, tuple[object, ...]] = OFF_VALUES,
    path: str = "",
) -> dict[str, object]:
    """Return the fields of a body that are implemented.

    Args:
        known: Names of the implemented fields.
        path: What to put before a field's name in an error, such as `messages.0.`.

    Raises:
        UnsupportedParameterError: A field asks for what we do not do, or has a name that nobody knows.
    """
    kept: dict[str, object] = {}
    for name, value in body.items():
        if name in known:
            kept[name] = value
        elif name in off_values:
            if value is not None and not any(_is_same(value, off) for off in off_values[name]):
                raise UnsupportedParameterError(f"{path}{name} is not supported; leave it out", param=f"{path}{name}")
        elif name not in ignored:
            raise UnsupportedParameterError(_unknown_field(path, name, known), param=f"{path}{name}"[:100])
    return kept


def _is_same(value: object, other: object) -> bool:
    # True == 1 in Python, but not in JSON.
    return type(value) is type(other) and value == other


def _unknown_field(path: str, name: str, known: Collection[str]) -> str:
    nearest = difflib.get_close_matches(name[:100], known, n=1)
    hint = f"did you mean {nearest[0]}?" if nearest else f"the known ones are {', '.join(sorted(known))}"
    return f"unknown field {path}{name[:100]!r}; {hint}"
