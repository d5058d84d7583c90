"""What a body may hold, as pydantic models, and how it becomes our own dataclasses.

Types are strict: `true`, `"1"` and `1.0` are no integers. Which fields are ignored or refused, see `fields`.
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import Annotated, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError

from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.openai.errors import UnsupportedParameterError
from rayserve_sarathi.openai.fields import MESSAGE_OFF_VALUES, OFF_VALUES, keep_known_fields
from rayserve_sarathi.request import MAX_LOGPROBS, MAX_SEED, MAX_TOKEN_ID, MIN_REPETITION_PENALTY
from rayserve_sarathi.text.chat_template import ChatOptions

MAX_STOPS = 16
MAX_STOP_CHARS = 512
MAX_LOGIT_BIASES = 1024
MAX_STOP_TOKEN_IDS = 256
MAX_MESSAGES = 4096
MAX_PROMPTS = 4096
"""Bounds the work on a body; what a server accepts is `IngressConfig.max_prompts_per_request`."""
MIN_SEED = -(2**63)
_SHOWN_CHARS = 60

TokenId = Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)]
StopString = Annotated[str, Field(min_length=1, max_length=MAX_STOP_CHARS)]


def _is_list(value: object) -> str:
    return "<list>" if isinstance(value, list | tuple) else "<one>"


def _prompt_kind(value: object) -> str:
    if not isinstance(value, list | tuple):
        return "<text>"
    if not value or isinstance(value[0], str):
        return "<texts>"
    return "<token id lists>" if isinstance(value[0], list | tuple) else "<token ids>"


Stop = Annotated[
    Annotated[StopString, Tag("<one>")] | Annotated[list[StopString], Field(max_length=MAX_STOPS), Tag("<list>")],
    Discriminator(_is_list),
]
TokenIds = Annotated[list[TokenId], Field(min_length=1)]
Prompt = Annotated[
    Annotated[str, Tag("<text>")]
    | Annotated[list[str], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<texts>")]
    | Annotated[TokenIds, Tag("<token ids>")]
    | Annotated[list[TokenIds], Field(min_length=1, max_length=MAX_PROMPTS), Tag("<token id lists>")],
    Discriminator(_prompt_kind),
]


class _Body(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class StreamOptions(_Body):
    """What a stream tells beside its text."""

    include_usage: bool | None = None
    """Whether a last chunk without choices holds the usage."""
    continuous_usage_stats: bool | None = None
    """Whether every chunk holds the usage so far."""
    include_obfuscation: bool | None = None
    """Accepted and without effect: chunks are never padded."""


class GenerationRequest(_Body):
    """The fields that both APIs share."""

    model: str | None = None
    max_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    """If absent: in a chat, what is left of the context; else at most 16. 0 only with `echo`."""
    max_completion_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    """The newer name of `max_tokens`."""
    n: Annotated[int, Field(ge=1)] | None = None
    temperature: Annotated[float, Field(ge=0, le=100)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=MAX_TOKEN_ID)] | None = None
    """0 and -1 keep all tokens."""
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    repetition_penalty: Annotated[float, Field(ge=MIN_REPETITION_PENALTY, le=100)] | None = None
    logit_bias: (
        Annotated[
            dict[Annotated[str, Field(pattern="^[0-9]{1,10}$")], Annotated[float, Field(ge=-100, le=100)]],
            Field(max_length=MAX_LOGIT_BIASES),
        ]
        | None
    ) = None
    seed: Annotated[int, Field(ge=MIN_SEED, le=MAX_SEED)] | None = None
    stop: Stop | None = None
    stop_token_ids: Annotated[list[TokenId], Field(max_length=MAX_STOP_TOKEN_IDS)] | None = None
    ignore_eos: bool | None = None
    min_tokens: Annotated[int, Field(ge=0, le=MAX_TOKEN_ID)] | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None
    cache_salt: Annotated[str, Field(max_length=256)] | None = None
    """Cached prefixes are shared only with requests of the same salt."""
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def num_choices(self) -> int:
        """Choices for each prompt."""
        return self.n or 1

    @property
    def num_tokens_asked(self) -> int | None:
        """Most tokens to generate, by either name; None if the client leaves it to us.

        Raises:
            InvalidRequestError: The two names contradict each other.
        """
        new, old = self.max_completion_tokens, self.max_tokens
        if new is not None and old is not None and new != old:
            raise InvalidRequestError(
                f"max_tokens={old} and max_completion_tokens={new} contradict each other; give one of them",
                param="max_completion_tokens",
            )
        return old if new is None else new

    @property
    def stops(self) -> list[str]:
        """The stop strings."""
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(GenerationRequest):
    """Body of `/v1/completions`."""

    prompt: Prompt
    echo: bool | None = None
    logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None
    add_special_tokens: bool | None = None

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        """The prompts, as a list even if there is but one."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        return self.prompt if isinstance(self.prompt[0], str | list) else [self.prompt]


class TextPart(_Body):
    """Text inside a message."""

    type: Literal["text"]
    text: str


class ChatMessage(_Body):
    """One message of a chat."""

    known_fields: ClassVar[frozenset[str]] = frozenset({"role", "content", "name"})

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        Annotated[str, Tag("<one>")] | Annotated[list[TextPart], Field(min_length=1), Tag("<list>")],
        Discriminator(_is_list),
    ]
    name: Annotated[str, Field(pattern="^[a-zA-Z0-9_-]{0,64}$")] | None = None

    def flatten(self) -> dict[str, str]:
        """Return the message as chat templates know it: text only, and no role that is OpenAI's alone."""
        content = self.content if isinstance(self.content, str) else "\n".join(part.text for part in self.content)
        role = "system" if self.role == "developer" else self.role
        return {"role": role, "content": content} | ({"name": self.name} if self.name else {})


class _Chat(_Body):
    messages: Annotated[list[ChatMessage], Field(min_length=1, max_length=MAX_MESSAGES)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, str | int | float | bool | None] | None = None

    @property
    def chat_options(self) -> ChatOptions:
        """How to render the messages."""
        return ChatOptions(
            add_generation_prompt=self.add_generation_prompt is not False,
            continue_final_message=self.continue_final_message is True,
            variables=self.chat_template_kwargs or {},
        )


class ChatCompletionRequest(GenerationRequest, _Chat):
    """Body of `/v1/chat/completions`."""

    max_tokens: Annotated[int, Field(ge=1, le=MAX_TOKEN_ID)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Field(ge=0, le=MAX_LOGPROBS)] | None = None


class TokenizeTextRequest(_Body):
    """Body of `/tokenize` for a text."""

    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChatRequest(_Chat):
    """Body of `/tokenize` for a chat."""

    model: str | None = None
    return_token_strs: bool | None = None


class DetokenizeRequest(_Body):
    """Body of `/detokenize`."""

    model: str | None = None
    tokens: list[TokenId]


_Model = TypeVar("_Model", bound=_Body)


def parse_body(cls: type[_Model], body: Mapping[str, object]) -> _Model:
    """Turn a JSON object into a request.

    Raises:
        InvalidRequestError: A field is missing, unknown, unsupported, or has a value that it cannot have.
    """
    off_values = OFF_VALUES
    if "echo" not in cls.model_fields:
        off_values = {**OFF_VALUES, "echo": (False,), "add_special_tokens": (False,)}
    if "top_logprobs" not in cls.model_fields:
        off_values = {**off_values, "top_logprobs": ()}
    fields = keep_known_fields(body, cls.model_fields, off_values=off_values)
    messages = fields.get("messages")
    if "messages" in cls.model_fields and isinstance(messages, list) and len(messages) <= MAX_MESSAGES:
        fields["messages"] = [_keep_known_message_fields(place, message) for place, message in enumerate(messages)]
    try:
        return cls.model_validate(fields)
    except ValidationError as error:
        raise _invalid_field(error, fields) from None


def _keep_known_message_fields(place: int, message: object) -> object:
    if not isinstance(message, dict):
        return message
    known = ChatMessage.known_fields
    return keep_known_fields(message, known, ignored=(), off_values=MESSAGE_OFF_VALUES, path=f"messages.{place}.")


def _invalid_field(error: ValidationError, body: Mapping[str, object]) -> InvalidRequestError:
    problem = error.errors(include_url=False, include_context=False)[0]
    path = ".".join(_path_in(body, problem["loc"], is_missing=problem["type"] == "missing"))
    if problem["type"] == "extra_forbidden":
        return UnsupportedParameterError(f"unknown field {path[:100]}; leave it out", param=path)
    given = "" if problem["type"] == "missing" else f", got {_shown(problem.get('input'))}"
    return InvalidRequestError(f"{path}: {problem['msg'][0].lower()}{problem['msg'][1:]}{given}", param=path)


def _path_in(value: object, loc: Sequence[int | str], *, is_missing: bool) -> Iterator[str]:
    """Yield the parts of pydantic's location that lead through the body; it has others, for the types that it tried."""
    for part in loc:
        is_there = isinstance(value, dict) and part in value
        if is_there or (isinstance(value, list) and isinstance(part, int)):
            value = value[part]  # type: ignore[index]  # one of the two
            yield str(part)
        elif is_missing and part == loc[-1]:
            yield str(part)


def _shown(value: object) -> str:
    if isinstance(value, list | tuple | dict):
        return f"{type(value).__name__} of {len(value)}"
    shown = ascii(value) if isinstance(value, str | int | float | bool | None) else type(value).__name__
    return shown if len(shown) <= _SHOWN_CHARS else shown[:_SHOWN_CHARS] + "..."
