"""The shapes of answers, for `/openapi.json`; answers themselves are plain dictionaries, see `answers`."""

from typing import Literal

from pydantic import BaseModel, ConfigDict


class _Answer(BaseModel):
    model_config = ConfigDict(extra="forbid", protected_namespaces=())


class ErrorDetail(_Answer):
    """What went wrong, and with which field."""

    message: str
    type: str
    param: str | None
    code: str


class ErrorResponse(_Answer):
    """Body of every error."""

    error: ErrorDetail


class PromptTokensDetails(_Answer):
    """Where prompt tokens came from."""

    cached_tokens: int


class Usage(_Answer):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: PromptTokensDetails


class CompletionLogprobs(_Answer):
    """Log-probabilities; the first token of an echoed prompt has none."""

    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float] | None]
    text_offset: list[int]


class CompletionChoice(_Answer):
    """One output."""

    index: int
    text: str
    logprobs: CompletionLogprobs | None
    finish_reason: Literal["stop", "length"] | None
    stop_reason: str | int | None


class CompletionResponse(_Answer):
    """Answer of `/v1/completions`; a stream's chunks have the same shape."""

    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatToken(_Answer):
    """A token and its log-probability."""

    token: str
    logprob: float
    bytes: list[int]


class ChatTokenLogprobs(ChatToken):
    """... and the most likely tokens in its place."""

    top_logprobs: list[ChatToken]


class ChatLogprobs(_Answer):
    """Log-probabilities of a message."""

    content: list[ChatTokenLogprobs]
    refusal: None


class ChatAnswerMessage(_Answer):
    """What the model says."""

    role: Literal["assistant"]
    content: str
    refusal: None


class ChatChoice(_Answer):
    """One output."""

    index: int
    message: ChatAnswerMessage
    logprobs: ChatLogprobs | None
    finish_reason: Literal["stop", "length"]
    stop_reason: str | int | None


class ChatCompletionResponse(_Answer):
    """Answer of `/v1/chat/completions`."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelResponse(_Answer):
    """A model."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: None
    max_model_len: int


class ModelListResponse(_Answer):
    """Answer of `/v1/models`."""

    object: Literal["list"]
    data: list[ModelResponse]


class TokenizeResponse(_Answer):
    """Answer of `/tokenize`."""

    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeResponse(_Answer):
    """Answer of `/detokenize`."""

    prompt: str


class TokenizerInfoResponse(_Answer):
    """Answer of `/tokenizer_info`."""

    tokenizer_class: str
    vocab_size: int
    bos_token: str | None
    eos_token: str | None
    pad_token: str | None
    unk_token: str | None
    chat_template: str | dict[str, str] | None
    eos_token_ids: list[int]
    max_model_len: int


class HealthResponse(_Answer):
    """Answer of `/health`."""

    status: Literal["ready"]


class TraceResponse(_Answer):
    """Answer of `/debug/trace`, in Chrome's trace event format."""

    displayTimeUnit: Literal["ms"]  # noqa: N815  # the format's name
    traceEvents: list[dict[str, object]]  # noqa: N815  # the format's name


class LateGapAnswer(_Answer):
    """A gap between two tokens that was above the target."""

    position: int
    gap_s: float
    cause: str
    culprit: str | None


class LateRequestAnswer(_Answer):
    """What was late of one choice."""

    request_id: str
    tbt_s: float
    num_late: dict[str, int]
    gaps: list[LateGapAnswer]


class WhyResponse(_Answer):
    """Answer of `/debug/why/{request_id}`; without requests if none has late tokens, or if they are forgotten."""

    requests: list[LateRequestAnswer]
