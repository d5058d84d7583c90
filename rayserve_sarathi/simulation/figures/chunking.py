"""What chunking costs a prompt: its time in chunks over its time as a whole (paper, section 5.4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.prediction import step_shapes

CHUNK_SIZES = (128, 256, 512, 1024, 2048, 4096)
PROMPT_LENS = (2048, 4096, 8192, 16384)


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkingSeries:
    """A row for each prompt, a column for each chunk size.

    Args:
        chunk_sizes: Tokens of a chunk.
        prompt_lens: Tokens of a prompt.
        whole_s: Time of each prompt in a single step.
        relative_times: Time in chunks over that; None where the chunk is longer than the prompt.
    """

    chunk_sizes: tuple[int, ...]
    prompt_lens: tuple[int, ...]
    whole_s: tuple[float, ...]
    relative_times: tuple[tuple[float | None, ...], ...]


def chunking(
    model: CostModel, *, chunk_sizes: Sequence[int] = CHUNK_SIZES, prompt_lens: Sequence[int] = PROMPT_LENS
) -> ChunkingSeries:
    """Return the times of prompts that have the pipeline for themselves, chunk after chunk, CPU time included."""
    whole_s = [_time_s(model, prompt_len, prompt_len) for prompt_len in prompt_lens]
    return ChunkingSeries(
        chunk_sizes=tuple(chunk_sizes),
        prompt_lens=tuple(prompt_lens),
        whole_s=tuple(whole_s),
        relative_times=tuple(
            tuple(
                _time_s(model, prompt_len, chunk_size) / time_s if chunk_size <= prompt_len else None
                for chunk_size in chunk_sizes
            )
            for prompt_len, time_s in zip(prompt_lens, whole_s, strict=True)
        ),
    )


def _time_s(model: CostModel, prompt_len: int, chunk_size: int) -> float:
    shapes = step_shapes(prefill=prompt_len, chunk=chunk_size, num_decodes=0, context_len=0)
    return sum(map(model.latency_s, shapes))
