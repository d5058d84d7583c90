"""A request: the tokens one client sequence has so far, and how many of them are computed.

`num_computed_tokens` catches up with `num_tokens`. Prefill, decode, a prefix-cache hit and recompute after a preemption
differ in nothing but these two numbers.
"""

import math
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import NamedTuple

from rayserve_sarathi.errors import InvalidRequestError

MAX_LOGPROBS = 20
MAX_SEED = 2**64 - 1
MAX_TOKEN_ID = 2**31 - 1
MIN_REPETITION_PENALTY = 0.01
"""What divides a logit must not be so small that the quotient overflows."""


class FinishReason(StrEnum):
    """Why a request ended; the first two are OpenAI's words."""

    STOP = "stop"
    LENGTH = "length"
    ABORT = "abort"
    ERROR = "error"
    LOST = "lost"
    """The engine died with the request: who waits for it may try another engine, or must be told so."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingParams:
    """How to choose the tokens of one request. Defaults are those of OpenAI's completions API.

    Raises:
        InvalidRequestError: A value is out of range; `param` names the field.
    """

    max_tokens: int = 16
    """Most tokens to generate; 0 computes the prompt only (with `prompt_logprobs`)."""
    min_tokens: int = 0
    """End-of-sequence and stop token ids cannot be chosen before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    top_k: int = 0
    """Keep the k most likely tokens; 0 keeps all."""
    min_p: float = 0.0
    """Keep tokens at least this likely relative to the most likely one."""
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    repetition_penalty: float = 1.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    """(token id, number added to its logit)."""
    seed: int | None = None
    """Randomness comes from (seed, position) alone, so equal seeds give equal tokens in any batch. None lets the engine
    draw one."""
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None
    """Number of most likely alternatives to report beside each chosen token; None reports nothing."""
    prompt_logprobs: int | None = None
    """The same for each prompt token."""

    def __post_init__(self) -> None:
        for name in _INTEGERS:
            value = getattr(self, name)
            if type(value) is not int and not (value is None and name in _OPTIONAL):
                raise InvalidRequestError(f"{name} must be a whole number, got {value!r}", param=name)
        for name in _NUMBERS:
            value = getattr(self, name)
            if type(value) not in (int, float) or not math.isfinite(value):
                raise InvalidRequestError(f"{name} must be a finite number, got {value!r}", param=name)
        if type(self.ignore_eos) is not bool:
            raise InvalidRequestError(f"ignore_eos must be True or False, got {self.ignore_eos!r}", param="ignore_eos")
        _check_tuples(self.stop_token_ids, self.logit_bias)
        _check_range("max_tokens", self.max_tokens, 0, MAX_TOKEN_ID)
        _check_range("min_tokens", self.min_tokens, 0, self.max_tokens)
        _check_range("temperature", self.temperature, 0, 100)
        if not 0 < self.top_p <= 1:
            raise InvalidRequestError(f"top_p must be greater than 0 and at most 1, got {self.top_p}", param="top_p")
        _check_range("top_k", self.top_k, 0, MAX_TOKEN_ID)
        _check_range("min_p", self.min_p, 0, 1)
        _check_range("presence_penalty", self.presence_penalty, -2, 2)
        _check_range("frequency_penalty", self.frequency_penalty, -2, 2)
        _check_range("repetition_penalty", self.repetition_penalty, MIN_REPETITION_PENALTY, 100)
        for token_id, bias in self.logit_bias:
            _check_range("logit_bias", token_id, 0, MAX_TOKEN_ID)
            _check_range("logit_bias", bias, -100, 100)
        for token_id in self.stop_token_ids:
            _check_range("stop_token_ids", token_id, 0, MAX_TOKEN_ID)
        if self.seed is not None:
            _check_range("seed", self.seed, 0, MAX_SEED)
        if self.logprobs is not None:
            _check_range("logprobs", self.logprobs, 0, MAX_LOGPROBS)
        if self.prompt_logprobs is not None:
            _check_range("prompt_logprobs", self.prompt_logprobs, 0, MAX_LOGPROBS)

    @property
    def has_penalties(self) -> bool:
        """Whether the logits depend on the tokens so far."""
        return self.presence_penalty != 0 or self.frequency_penalty != 0 or self.repetition_penalty != 1


_INTEGERS = ("max_tokens", "min_tokens", "top_k", "seed", "logprobs", "prompt_logprobs")
_OPTIONAL = ("seed", "logprobs", "prompt_logprobs")
_NUMBERS = (
    "temperature",
    "top_p",
    "min_p",
    "presence_penalty",
    "frequency_penalty",
    "repetition_penalty",
)


def _check_tuples(stop_token_ids: object, logit_bias: object) -> None:
    is_tuple_of_ids = isinstance(stop_token_ids, tuple) and all(type(token_id) is int for token_id in stop_token_ids)
    if not is_tuple_of_ids:
        raise InvalidRequestError(
            f"stop_token_ids must be a tuple of token ids, got {stop_token_ids!r}", param="stop_token_ids"
        )
    is_tuple_of_pairs = isinstance(logit_bias, tuple) and all(
        isinstance(pair, tuple)
        and len(pair) == 2
        and type(pair[0]) is int
        and type(pair[1]) in (int, float)
        and math.isfinite(pair[1])
        for pair in logit_bias
    )
    if not is_tuple_of_pairs:
        raise InvalidRequestError(
            f"logit_bias must be a tuple of (token id, finite number), got {logit_bias!r}", param="logit_bias"
        )


def _check_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise InvalidRequestError(f"{name} must be between {low} and {high}, got {value}", param=name)


class TokenLogprobs(NamedTuple):
    """Log-probability of one token, and of the most likely tokens at its position, most likely first."""

    token_id: int
    logprob: float
    top_token_ids: tuple[int, ...]
    top_logprobs: tuple[float, ...]


class RequestOutput(NamedTuple):
    """What one step did for one request.

    A NamedTuple, as one is made per token: a frozen dataclass costs four times as much to construct.
    """

    request_id: str
    token_ids: tuple[int, ...] = ()
    """New tokens; a token that ended the request (end of sequence, stop token) is included."""
    finish_reason: FinishReason | None = None
    logprobs: tuple[TokenLogprobs, ...] | None = None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None = None
    """With the first output of a request that asked: one entry for each prompt token but the first."""
    num_cached_tokens: int = 0
    """Prompt tokens whose KV came from the prefix cache."""
    error: str | None = None
    """What went wrong, when `finish_reason` is ERROR or LOST."""


class Request:
    """State of one request; its owner is the scheduler.

    Args:
        request_id: Chosen by us, unique in the scheduler's life.
        prompt_token_ids: At least one token.
        sampling: How to choose its tokens.
        eos_token_ids: Tokens that end it, unless `sampling.ignore_eos`.
        output_token_ids: Tokens that an earlier scheduler already emitted, when the request is resubmitted.
        cache_salt: Requests share cached prefixes only with requests of the same salt (one per tenant).
        arrival_s: When it arrived, on the scheduler's clock.

    Raises:
        InvalidRequestError: The prompt is empty.
    """

    __slots__ = (
        "admitted_s",
        "arrival_s",
        "block_hashes",
        "block_table",
        "cache_salt",
        "eos_token_ids",
        "first_scheduled_s",
        "first_token_s",
        "has_extras",
        "is_aborted",
        "last_token_s",
        "max_num_tokens",
        "num_cached_tokens",
        "num_computed_tokens",
        "num_in_flight_tokens",
        "num_lost_tokens",
        "num_preemptions",
        "num_prompt_tokens",
        "order",
        "prompt_logprobs",
        "request_id",
        "sampling",
        "sampling_row",
        "stop_token_ids",
        "token_ids",
    )

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        eos_token_ids: Iterable[int] = (),
        output_token_ids: Sequence[int] = (),
        cache_salt: str = "",
        arrival_s: float = 0.0,
    ) -> None:
        if not prompt_token_ids:
            raise InvalidRequestError("the prompt is empty; give at least one token", param="prompt")
        self.request_id = request_id
        self.sampling = sampling
        self.eos_token_ids = frozenset() if sampling.ignore_eos else frozenset(eos_token_ids)
        self.stop_token_ids = self.eos_token_ids | frozenset(sampling.stop_token_ids)
        self.cache_salt = cache_salt
        self.arrival_s = arrival_s

        self.token_ids = array("i", prompt_token_ids)
        self.token_ids.extend(output_token_ids)
        self.num_prompt_tokens = len(prompt_token_ids)
        self.max_num_tokens = self.num_prompt_tokens + sampling.max_tokens
        """Tokens it has when it stops at the latest."""
        self.num_computed_tokens = 0
        """Tokens whose KV is in the cache, as far as steps that have returned tell."""
        self.num_in_flight_tokens = 0
        """Tokens in steps that have not returned; above 0, the request is in flight."""
        self.num_cached_tokens = 0
        self.num_lost_tokens = 0
        """Tokens that were computed before a preemption and are not yet again."""
        self.num_preemptions = 0
        self.is_aborted = False
        self.order = 0
        """Position in the order of arrival; the scheduler sets it."""

        self.block_table = array("i")
        """Ids of the blocks that hold its KV, in order of position; the block manager writes it."""
        self.block_hashes: list[bytes] = []
        """Hash of each full block of `token_ids`, chained from the first; the block manager writes it."""
        self.sampling_row = b""
        """`sampling` in the packed form of `step.SAMPLING_DTYPE`; the scheduler sets it."""
        self.has_extras = False
        """Whether a step needs more of it than `sampling_row`; the scheduler sets it."""
        self.prompt_logprobs: list[TokenLogprobs] = []

        self.first_scheduled_s: float | None = None
        self.admitted_s: float | None = None
        """When it began to run, for the last time if it was preempted."""
        self.first_token_s: float | None = None
        self.last_token_s: float | None = None

    @property
    def num_tokens(self) -> int:
        """Tokens known: prompt and output."""
        return len(self.token_ids)

    @property
    def num_output_tokens(self) -> int:
        """Tokens generated."""
        return len(self.token_ids) - self.num_prompt_tokens

    @property
    def num_scheduled_tokens(self) -> int:
        """Tokens that are computed or in flight: where the next chunk begins."""
        return self.num_computed_tokens + self.num_in_flight_tokens

    def __repr__(self) -> str:
        return (
            f"Request({self.request_id!r}, prompt={self.num_prompt_tokens}, output={self.num_output_tokens},"
            f" computed={self.num_computed_tokens}, in_flight={self.num_in_flight_tokens})"
        )
