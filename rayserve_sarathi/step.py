"""The two messages between the scheduler and the stages: what to compute in a step, and what came of it.

A `StepInput` is complete: a stage needs nothing but its weights, its KV cache and this message, so it keeps no state
of requests, and a new stage can take the place of a dead one.

Dimensions: R requests in the step; T tokens in it; S requests that sample a token in it; B biased logits.
Arrays are flat and packed in the order of `request_ids`, so that a message costs a few copies whatever its size.
"""

from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from rayserve_sarathi.request import SamplingParams, TokenLogprobs

Int32Array = npt.NDArray[np.int32]
Float32Array = npt.NDArray[np.float32]

SAMPLING_DTYPE = np.dtype(
    [
        ("temperature", np.float32),
        ("top_p", np.float32),
        ("top_k", np.int32),
        ("min_p", np.float32),
        ("presence_penalty", np.float32),
        ("frequency_penalty", np.float32),
        ("repetition_penalty", np.float32),
        ("has_logprobs", np.int32),
        ("num_logprobs", np.int32),
        ("seed", np.uint64),
    ]
)


def pack_sampling(sampling: SamplingParams) -> bytes:
    """Return the row of `SAMPLING_DTYPE` that stands for `sampling`."""
    row = (
        sampling.temperature,
        sampling.top_p,
        sampling.top_k,
        sampling.min_p,
        sampling.presence_penalty,
        sampling.frequency_penalty,
        sampling.repetition_penalty,
        sampling.logprobs is not None,
        sampling.logprobs or 0,
        sampling.seed or 0,
    )
    return np.array([row], dtype=SAMPLING_DTYPE).tobytes()


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenHistory:
    """Tokens of a request whose logits depend on them (penalties)."""

    row: int
    """Which of the S sampling requests."""
    prompt_token_ids: Int32Array
    output_token_ids: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PromptLogprobsQuery:
    """Ask for the log-probability of prompt tokens at the positions of a chunk."""

    request: int
    """Which of the R requests."""
    num_logprobs: int
    target_token_ids: Int32Array
    """The prompt token that follows each of the chunk's first `len(target_token_ids)` tokens."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitBias:
    """Numbers to add to logits before anything else; minus infinity bans a token.

    Args:
        rows: Which of the S sampling requests, [B].
        token_ids: Which logit of it, [B].
        values: What to add, [B].
    """

    rows: Int32Array
    token_ids: Int32Array
    values: Float32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class PendingTokens:
    """Tokens to compute that the step before this one samples: the scheduler does not know them yet, the stage will.

    If that step fails, so do their requests, and whatever a stage takes in their place comes to nothing.

    Args:
        positions: Which of the T tokens, [P]; what stands there in `StepInput.token_ids` means nothing.
        samples: Which of the S of the step before each is, [P].
    """

    positions: Int32Array
    samples: Int32Array


@dataclass(frozen=True, slots=True, kw_only=True)
class StepInput:
    """One model iteration: a chunk of each of R requests, those with a single token first.

    Args:
        step_id: Number of the step, counted from 0 by the scheduler.
        epoch: Generation of the pipeline; a message of an older one is dropped.
        request_ids: R ids, for errors and traces only.
        token_ids: Tokens to compute, [T].
        query_lens: Tokens of each request in this step, [R]; they sum to T.
        context_lens: Tokens of each request whose KV was written by earlier steps, [R].
        block_tables: Block ids of each request's context and chunk, concatenated.
        num_blocks: Length of each request's part of `block_tables`, [R].
        sample_requests: The S requests (indices into R, ascending) whose last token in this step is their last known
            token, so that it yields the next one.
        sampling: How to sample them, [S] of `SAMPLING_DTYPE`.
        pending: Tokens that are not known yet; None for none.
        histories: Token histories of those among the S that have penalties; a pending token is not in them.
        logit_bias: Biased logits; None for none.
        prompt_logprobs: Prompt log-probabilities that are asked for.
    """

    step_id: int
    epoch: int
    request_ids: tuple[str, ...]
    token_ids: Int32Array
    query_lens: Int32Array
    context_lens: Int32Array
    block_tables: Int32Array
    num_blocks: Int32Array
    sample_requests: Int32Array
    sampling: npt.NDArray[np.void]
    pending: PendingTokens | None = None
    histories: tuple[TokenHistory, ...] = ()
    logit_bias: LogitBias | None = None
    prompt_logprobs: tuple[PromptLogprobsQuery, ...] = ()

    @property
    def num_tokens(self) -> int:
        """T, tokens in the step."""
        return len(self.token_ids)

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Tokens of each request in this step, by request id."""
        return dict(zip(self.request_ids, self.query_lens.tolist(), strict=True))


@dataclass(frozen=True, slots=True, kw_only=True)
class StageTiming:
    """When a stage had a step, in seconds on its own monotonic clock."""

    stage: int
    receive_s: float
    start_s: float
    end_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class StepFault:
    """Why a stage could not compute a step."""

    message: str
    stage: int
    is_stage_broken: bool = False
    """Whether that stage can compute no other step either."""
    is_consequence: bool = False
    """Whether it follows from the failure of another rank, whose own log says more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StepOutput:
    """What came of a `StepInput`.

    Args:
        step_id: That of the input; `epoch` likewise.
        token_ids: The token sampled for each of the S sampling requests, [S]. Empty if `fault` is set.
        logprobs: By index into S, for those that asked.
        prompt_logprobs: By index into R, one entry for each target token, for those that asked.
        errors: By index into R: why that request alone failed; what else the step says of it means nothing.
        timings: One entry a stage, in order.
        fault: Why the step failed as a whole; its requests fail with it.
    """

    step_id: int
    epoch: int
    token_ids: Int32Array
    logprobs: dict[int, TokenLogprobs] = field(default_factory=dict)
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)
    errors: dict[int, str] = field(default_factory=dict)
    timings: tuple[StageTiming, ...] = ()
    fault: StepFault | None = None
