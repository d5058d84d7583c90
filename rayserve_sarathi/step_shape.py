"""What the time of a step depends on, and the interface of those who predict it."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from rayserve_sarathi.step import StepInput


@dataclass(frozen=True, slots=True, kw_only=True)
class StepShape:
    """Sizes of a step: a decode each of some requests, and chunks of others.

    Args:
        num_decodes: Requests with a single token whose context is all but that token.
        decode_context_tokens: Tokens of their contexts, all together.
        chunks: `(query_len, context_len)` of each request with more than one token.
        num_samples: Requests that sample a token.
    """

    num_decodes: int
    decode_context_tokens: int
    chunks: tuple[tuple[int, int], ...]
    num_samples: int

    @property
    def num_tokens(self) -> int:
        """Tokens in the step."""
        return self.num_decodes + sum(query_len for query_len, _ in self.chunks)


class StepTimeModel(Protocol):
    """Predicts how long each stage of a pipeline takes for a step."""

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""

    def stage_times_s(self, shape: StepShape) -> Sequence[float]:
        """Return the time that each stage computes, all-reduces of tensor parallelism included."""

    def transfer_s(self, shape: StepShape) -> float:
        """Return how long the hidden states of the step take from one stage to the next."""

    def cpu_s(self, shape: StepShape) -> float:
        """Return how long the scheduler and the first stage's host take before the first stage begins."""


def shape_of(step: StepInput) -> StepShape:
    """Return the sizes of a step."""
    query_lens = step.query_lens.tolist()
    context_lens = step.context_lens.tolist()
    num_decodes = sum(query_len == 1 for query_len in query_lens)
    return StepShape(
        num_decodes=num_decodes,  # single tokens come first
        decode_context_tokens=sum(context_lens[:num_decodes]),
        chunks=tuple(zip(query_lens[num_decodes:], context_lens[num_decodes:], strict=True)),
        num_samples=len(step.sample_requests),
    )
