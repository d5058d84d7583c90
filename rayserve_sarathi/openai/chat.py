"""`/v1/chat/completions`: the next message of a chat."""

import uuid

from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.openai.answers import JsonObject, Plan
from rayserve_sarathi.openai.generation import ChoiceDelta
from rayserve_sarathi.openai.logprobs import chat_logprobs
from rayserve_sarathi.openai.prompts import RequestPlanner
from rayserve_sarathi.openai.protocol import ChatCompletionRequest, StreamOptions
from rayserve_sarathi.text.tokenizer import Tokenizer


class ChatFormat:
    """A choice of `/v1/chat/completions`, whole or in chunks."""

    object_name = "chat.completion"
    chunk_object_name = "chat.completion.chunk"

    def __init__(self, tokenizer: Tokenizer, *, has_logprobs: bool) -> None:
        self._tokenizer = tokenizer
        self._has_logprobs = has_logprobs

    def choice(self, delta: ChoiceDelta) -> JsonObject:
        """See `ChoiceFormat`."""
        return self._choice(delta, "message", {"role": "assistant", "content": delta.text, "refusal": None})

    def chunk_choice(self, delta: ChoiceDelta, *, is_first: bool) -> JsonObject:
        """See `ChoiceFormat`."""
        content: JsonObject = {"content": delta.text}
        # The role comes with the first text instead of before it: one event less before the first token is seen.
        return self._choice(delta, "delta", {"role": "assistant", **content} if is_first else content)

    def _choice(self, delta: ChoiceDelta, name: str, content: JsonObject) -> JsonObject:
        return {
            "index": delta.choice_index,
            name: content,
            "logprobs": chat_logprobs(self._tokenizer, delta.logprobs) if self._has_logprobs else None,
            "finish_reason": delta.finish_reason,
            "stop_reason": delta.stop_reason,
        }


async def plan_chat(
    request: ChatCompletionRequest,
    planner: RequestPlanner,
    tokenizer: Tokenizer,
    *,
    model: str,
    created: int,
    tenant: str,
) -> Plan:
    """Render and tokenise the messages and lay out the choices.

    Raises:
        InvalidRequestError: The chat does not fit the model.
    """
    prompt = await planner.tokenize_chat([message.flatten() for message in request.messages], request.chat_options)
    answer_id = f"chatcmpl-{uuid.uuid4().hex}"
    choices = planner.choices(
        request,
        prompt,
        id_prefix=answer_id,
        max_tokens=planner.fit_max_tokens(prompt, asked=request.num_tokens_asked, default=None),
        logprobs=_num_logprobs(request),
        tenant=tenant,
    )
    return Plan(
        answer_id=answer_id,
        created=created,
        model=model,
        prompts=[prompt],
        choices=choices,
        choice_format=ChatFormat(tokenizer, has_logprobs=request.logprobs is True),
        stream_options=request.stream_options or StreamOptions(),
    )


def _num_logprobs(request: ChatCompletionRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequestError("top_logprobs needs logprobs true", param="top_logprobs")
    return None
