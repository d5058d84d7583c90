"""What a machine reaches at best, and how much attention of a step there is to do."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout


@dataclass(frozen=True, slots=True)
class Limits:
    """What a machine reaches: bytes moved and operations, a second."""

    bandwidth: float
    operations: float

    def time_s(self, num_bytes: float, num_operations: float) -> float:
        """Return the least time for so much."""
        return max(num_bytes / self.bandwidth, num_operations / self.operations)

    def or_better(self, other: "Limits") -> "Limits":
        """Return the higher of two measurements: a machine that others share is slower at times."""
        return Limits(max(self.bandwidth, other.bandwidth), max(self.operations, other.operations))


class AttentionWork:
    """Attention of a step in one layer, its KV blocks scattered over a pool that they fill.

    Args:
        lens: Of each request, (query_len, context_len).
        heads: N query heads, K KV heads, and their size H.
        block_size: Tokens per KV block.
    """

    def __init__(self, lens: Sequence[tuple[int, int]], heads: tuple[int, int, int], *, block_size: int) -> None:
        query_lens, context_lens = (np.array(each, dtype=np.int32) for each in zip(*lens, strict=True))
        num_blocks = -(-(query_lens + context_lens) // block_size)
        self.num_tokens = int(query_lens.sum())
        self.num_blocks = int(num_blocks.sum())
        self._layout = StepLayout(
            query_lens=query_lens,
            context_lens=context_lens,
            block_tables=np.random.default_rng(0).permutation(self.num_blocks).astype(np.int32),
            num_blocks=num_blocks,
            block_size=block_size,
        )
        num_heads, num_kv_heads, head_size = heads
        self.num_kv_numbers = 2 * self.num_blocks * block_size * num_kv_heads * head_size
        """Keys and values."""
        num_pairs = sum(query_len * context_len + query_len * (query_len + 1) / 2 for query_len, context_len in lens)
        self.num_operations = 4 * num_pairs * num_heads * head_size

    def metadata(self, device: str) -> AttentionMetadata:
        """Return the step's lengths and blocks on a device."""
        return AttentionMetadata.of(self._layout, torch.device(device))
