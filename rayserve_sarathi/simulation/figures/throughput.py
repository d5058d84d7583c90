"""Tokens a second of prefills and of decodes against the number of requests in a step (paper, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.figures.machine import decode_step, interval_s, prompt_step

BATCH_SIZES = (1, 2, 4, 8, 16, 32, 64, 128)


@dataclass(frozen=True, slots=True, kw_only=True)
class ThroughputSeries:
    """A point for each batch size.

    Args:
        num_tokens: Of each prompt, and of each decode's context.
        batch_sizes: Requests in a step.
        prefill_tokens_per_s: Of steps of whole prompts.
        decode_tokens_per_s: Of steps of decodes.
    """

    num_tokens: int
    batch_sizes: tuple[int, ...]
    prefill_tokens_per_s: tuple[float, ...]
    decode_tokens_per_s: tuple[float, ...]


def throughput(
    model: CostModel, *, num_tokens: int = 1024, batch_sizes: Sequence[int] = BATCH_SIZES
) -> ThroughputSeries:
    """Return both, with the pipeline full of such steps."""
    return ThroughputSeries(
        num_tokens=num_tokens,
        batch_sizes=tuple(batch_sizes),
        prefill_tokens_per_s=tuple(
            size * num_tokens / interval_s(model, prompt_step(size, num_tokens)) for size in batch_sizes
        ),
        decode_tokens_per_s=tuple(size / interval_s(model, decode_step(size, num_tokens)) for size in batch_sizes),
    )
