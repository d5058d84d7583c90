"""What an attention backend is: the owner of the KV cache's layout, who writes it and attends to it.

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

from typing import Protocol

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata


class AttentionBackend(Protocol):
    """Attention over a paged KV cache. It keeps no state of a layer, so one instance serves all.

    Attributes:
        is_graphable: Whether all that depends on a step's lengths is read on the device, so that a CUDA graph of the
            calls holds for other lengths.
        is_in_layers: Whether `kernels.layers` may compute in its place, whole layers at once.
    """

    is_graphable: bool

    @property
    def is_in_layers(self) -> bool:
        """See above."""

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return why it cannot attend so, or None if it can."""

    def kv_cache_shape(self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        """Return the shape of a layer's key pool, which is also that of its value pool; blocks come first."""

    def rotate_and_write(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Rotate this step's queries and keys, and store its keys and values in their slots, in place.

        Args:
            qkv: Queries, keys and values of each token, [T, N + 2 K, H], contiguous; may be changed.
            k_cache: Key pool in the backend's layout; `v_cache` likewise.
            cos: [T, 1, H / 2] float32; `sin` likewise.
            metadata: The step.

        Returns:
            The queries, [T, N, H]; perhaps a part of qkv.
        """

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
