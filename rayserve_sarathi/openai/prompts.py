"""From a validated request to the choices that the engine generates."""

import asyncio
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.errors import ContextLengthError, InvalidRequestError
from rayserve_sarathi.openai.errors import ModelNotFoundError
from rayserve_sarathi.openai.generation import Choice
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.protocol import GenerationRequest
from rayserve_sarathi.request import MAX_SEED, SamplingParams
from rayserve_sarathi.text.chat_template import ChatOptions, Message
from rayserve_sarathi.text.stop import StopStrings
from rayserve_sarathi.text.tokenizer import Tokenizer

_MAX_SIZE_ON_LOOP = 2000
"""So many characters take a millisecond or two to tokenise; more go to a thread."""
_MAX_PROMPT_LOGPROBS = 2_000_000
"""Each is about 30 bytes of an answer, and more in memory."""
_GOLDEN_GAMMA = 0x9E3779B97F4A7C15
"""An odd number near 2**64 / phi: multiples of it are far apart."""

_Result = TypeVar("_Result")


async def off_loop(size: int, work: Callable[[], _Result]) -> _Result:
    """Do work on `size` characters or tokens without holding up the event loop."""
    if size <= _MAX_SIZE_ON_LOOP:
        return work()
    return await asyncio.to_thread(work)


def derive_seed(seed: int, index: int) -> int:
    """Return the seed of the choice `index` of a prompt: the first one's is the request's own."""
    return (seed + index * _GOLDEN_GAMMA) & MAX_SEED


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptTokens:
    """A tokenised prompt.

    Raises:
        InvalidRequestError: It has no tokens.
    """

    text: str | None
    """As the client wrote it; None if it sent tokens or a chat."""
    token_ids: list[int]
    param: Literal["prompt", "messages"]
    """The field that it came from."""

    def __post_init__(self) -> None:
        if not self.token_ids:
            raise InvalidRequestError(f"{self.param} is empty; give at least one token", param=self.param)


class RequestPlanner:
    """Checks requests against the model, and makes choices of them.

    Args:
        seed: Start of the series of seeds for requests that bring none.
    """

    def __init__(self, tokenizer: Tokenizer, model: ModelCard, config: IngressConfig, *, seed: int) -> None:
        self._tokenizer = tokenizer
        self._model = model
        self._config = config
        self._seeds = random.Random(seed)

    def check_model(self, name: str | None) -> None:
        """Raise ModelNotFoundError if a client asks for a model that is not served."""
        if name is not None and name != self._model.name:
            raise ModelNotFoundError(f"the model {name[:200]!r} does not exist; use {self._model.name!r}")

    def check_request(self, request: GenerationRequest, *, num_prompts: int) -> None:
        """Check what needs no tokens yet.

        Raises:
            InvalidRequestError: A value that is well-formed, but not possible with this model or this server.
        """
        self.check_model(request.model)
        if request.num_choices > self._config.max_num_choices:
            limit = self._config.max_num_choices
            raise InvalidRequestError(f"n must be at most {limit}, got {request.n}", param="n")
        if num_prompts > self._config.max_prompts_per_request:
            limit = self._config.max_prompts_per_request
            raise InvalidRequestError(f"prompt must hold at most {limit} prompts, got {num_prompts}", param="prompt")
        if request.stream_options is not None and not request.stream:
            raise InvalidRequestError("stream_options needs stream true", param="stream_options")
        self.check_token_ids("stop_token_ids", request.stop_token_ids or ())
        self.check_token_ids("logit_bias", [int(token_id) for token_id in request.logit_bias or ()])

    def check_token_ids(self, param: str, token_ids: Sequence[int]) -> None:
        """Raise InvalidRequestError if a token is outside of the model's vocabulary."""
        vocab_size = self._model.vocab_size
        if token_ids and max(token_ids) >= vocab_size:
            raise InvalidRequestError(
                f"{param} holds the token id {max(token_ids)}, but the vocabulary has {vocab_size} tokens", param=param
            )

    async def tokenize(
        self, prompts: Sequence[str] | Sequence[list[int]], *, add_special_tokens: bool
    ) -> list[PromptTokens]:
        """Return the tokens of each prompt.

        Raises:
            InvalidRequestError: One has none, or one that the model does not know.
        """
        num_chars = sum(len(prompt) for prompt in prompts)
        for prompt in prompts:
            if isinstance(prompt, str):
                self._check_length(prompt, param="prompt")
        return await off_loop(
            num_chars, lambda: [self._tokenize(prompt, add_special_tokens=add_special_tokens) for prompt in prompts]
        )

    def _check_length(self, text: str, *, param: str) -> None:
        """Refuse what cannot fit before it is tokenised, which takes seconds and much memory for some megabytes."""
        most_bytes = self._tokenizer.max_token_bytes
        limit = self._model.max_model_len
        # Normalisation (NFC, say) makes a text shorter, but never to a quarter.
        if most_bytes is not None and len(text) > 4 * limit * most_bytes:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, {len(text)} characters of text are"
                f" more than so many tokens of at most {most_bytes} bytes hold. Please send a shorter text.",
                param=param,
            )

    def _tokenize(self, prompt: str | list[int], *, add_special_tokens: bool) -> PromptTokens:
        if isinstance(prompt, str):
            token_ids = self._tokenizer.encode(prompt, add_special_tokens=add_special_tokens)
            return PromptTokens(text=prompt, token_ids=token_ids, param="prompt")
        self.check_token_ids("prompt", prompt)
        return PromptTokens(text=None, token_ids=prompt, param="prompt")

    async def tokenize_chat(self, messages: Sequence[Message], options: ChatOptions) -> PromptTokens:
        """Return the tokens of a chat.

        Raises:
            InvalidRequestError: The template refuses it.
        """
        num_chars = sum(len(message["content"]) for message in messages)
        for message in messages:
            self._check_length(message["content"], param="messages")
        token_ids = await off_loop(num_chars, lambda: self._tokenizer.encode_chat(messages, options))
        return PromptTokens(text=None, token_ids=token_ids, param="messages")

    def fit_max_tokens(self, prompt: PromptTokens, *, asked: int | None, default: int | None) -> int:
        """Return how many tokens may be generated after a prompt.

        Args:
            asked: What the client asks for.
            default: What it gets if it does not ask; None for all that is left of the context.

        Raises:
            ContextLengthError: The context is too short.
        """
        num_prompt_tokens = len(prompt.token_ids)
        limit = self._model.max_model_len
        num_left = limit - num_prompt_tokens
        wanted = 1 if asked is None else asked
        if num_left < wanted:
            raise ContextLengthError(
                f"This model's maximum context length is {limit} tokens. However, you requested"
                f" {num_prompt_tokens + wanted} tokens ({num_prompt_tokens} in the prompt, {wanted} for the"
                " completion). Please reduce the length of the prompt or the number of tokens to generate.",
                param=prompt.param,
            )
        if asked is not None:
            return asked
        return num_left if default is None else min(default, num_left)

    def choices(
        self,
        request: GenerationRequest,
        prompt: PromptTokens,
        *,
        id_prefix: str,
        max_tokens: int,
        logprobs: int | None,
        prompt_logprobs: int | None = None,
        tenant: str = "",
    ) -> list[Choice]:
        """Return the `n` choices of one prompt.

        Args:
            id_prefix: Unique; the choices' request ids begin with it.
            tenant: Whose request it is; cached prefixes are never shared between tenants.
        """
        stops = StopStrings(request.stops, is_included=request.include_stop_str_in_output is True)
        seed = self._seeds.getrandbits(64) if request.seed is None else request.seed
        return [
            Choice(
                request_id=f"{id_prefix}-{index}",
                prompt_token_ids=prompt.token_ids,
                sampling=_sampling(
                    request,
                    max_tokens=max_tokens,
                    seed=derive_seed(seed, index),
                    logprobs=logprobs,
                    prompt_logprobs=prompt_logprobs,
                ),
                stops=stops,
                skip_special_tokens=request.skip_special_tokens is not False,
                cache_salt=f"{tenant}:{request.cache_salt or ''}" if tenant else request.cache_salt or "",
            )
            for index in range(request.num_choices)
        ]


def check_prompt_logprobs(choices: Sequence[Choice]) -> None:
    """Refuse an echo that would fill the memory with log-probabilities, all of which come at once.

    Raises:
        InvalidRequestError: There are too many.
    """
    number = sum(
        len(choice.prompt_token_ids) * (choice.sampling.prompt_logprobs + 1)
        for choice in choices
        if choice.sampling.prompt_logprobs is not None
    )
    if number > _MAX_PROMPT_LOGPROBS:
        raise InvalidRequestError(
            f"the echo would hold {number} log-probabilities, and at most {_MAX_PROMPT_LOGPROBS} are allowed;"
            " send fewer prompts at once, or lower logprobs or n",
            param="logprobs",
        )


def _sampling(
    request: GenerationRequest, *, max_tokens: int, seed: int, logprobs: int | None, prompt_logprobs: int | None
) -> SamplingParams:
    return SamplingParams(
        max_tokens=max_tokens,
        min_tokens=request.min_tokens or 0,
        temperature=1.0 if request.temperature is None else request.temperature,
        top_p=1.0 if request.top_p is None else request.top_p,
        top_k=max(0, request.top_k or 0),
        min_p=request.min_p or 0.0,
        presence_penalty=request.presence_penalty or 0.0,
        frequency_penalty=request.frequency_penalty or 0.0,
        repetition_penalty=1.0 if request.repetition_penalty is None else request.repetition_penalty,
        logit_bias=tuple((int(token_id), bias) for token_id, bias in (request.logit_bias or {}).items()),
        seed=seed,
        stop_token_ids=tuple(request.stop_token_ids or ()),
        ignore_eos=request.ignore_eos is True,
        logprobs=logprobs,
        prompt_logprobs=prompt_logprobs,
    )
