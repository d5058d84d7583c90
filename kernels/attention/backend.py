"""What an attention backend is: the owner of the KV cache's layout, who writes it and attends to it.

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

from typing import Protocol

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata


class AttentionBackend(Protocol):
    """Attention over a paged KV cache. It keeps no state, so one instance serves every layer."""

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return why it cannot attend so, or None if it can."""

    def kv_cache_shape(self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """Return the shape of a layer's key pool, which is also that of its value pool; blocks come first."""

    def write_kv(self, k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, metadata: AttentionMetadata) -> None:
        """Store this step's keys and values, [T, K, H] each, in their slots, in place."""

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        """Attend from each token to its request's tokens up to itself; this step's keys and values are stored already.

        Args:
            q: Queries, [T, N, H].
            k_cache: Key pool in the backend's layout; `v_cache` likewise.
            metadata: Which tokens belong together and where their keys are.
            scale: Factor of the scores.
            sliding_window: Tokens that a token sees, itself included; None for all.

        Returns:
            [T, N, H].
        """
