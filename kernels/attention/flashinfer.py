"""Attention by the package flashinfer (Ye et al., 2025).

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.fused import rotate_and_write

# For partial results of split contexts; what its documentation advises.
_WORKSPACE_BYTES = 128 * 2**20


class FlashInferAttention:
    """Attention by flashinfer's wrapper for paged prefills, which decodes are too. A block holds keys as [S, K, H].

    It plans each step on the host, once for all layers with the same window.
    """

    is_graphable = False
    is_in_layers = False

    def __init__(self) -> None:
        self._workspace: Tensor | None = None
        self._planned: AttentionMetadata | None = None
        self._wrappers: dict[int | None, BatchPrefillWithPagedKVCacheWrapper] = {}

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `AttentionBackend`."""
        if device.type != "cuda":
            return f"it is for GPUs, not {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if head_size not in (64, 128, 256):
            return f"the head size must be 64, 128 or 256, got {head_size}"
        return None

    def kv_cache_shape(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, int, int, int]:
        """Return [P, S, K, H]."""
        return (num_blocks, block_size, num_kv_heads, head_size)

    def rotate_and_write(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Rotate queries and keys, store keys and values; see `AttentionBackend.rotate_and_write`."""
        return rotate_and_write(qkv, k_cache, v_cache, cos=cos, sin=sin, slot_mapping=metadata.slot_mapping)

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
        """Attend from each token to its request's tokens up to itself; see `AttentionBackend.attention`."""
        if metadata is not self._planned:
            self._planned = metadata
            self._wrappers = {}
        if sliding_window not in self._wrappers:
            self._wrappers[sliding_window] = self._plan(q, k_cache, metadata, scale, sliding_window)
        out: Tensor = self._wrappers[sliding_window].run(q, (k_cache, v_cache))
        return out

    def _plan(
        self, q: Tensor, k_cache: Tensor, metadata: AttentionMetadata, scale: float, sliding_window: int | None
    ) -> BatchPrefillWithPagedKVCacheWrapper:
        if self._workspace is None:
            self._workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
        wrapper = BatchPrefillWithPagedKVCacheWrapper(self._workspace, "NHD")
        block_size, num_kv_heads, head_size = k_cache.shape[1:]
        # Its block tables are ragged: each request's blocks one after the other.
        num_blocks = (metadata.seq_lens + block_size - 1) // block_size
        first_blocks = torch.nn.functional.pad(num_blocks.cumsum(0), (1, 0)).int()
        is_needed = torch.arange(metadata.block_tables.shape[1], device=q.device) < num_blocks[:, None]
        wrapper.plan(
            metadata.cu_query_lens,
            first_blocks,
            metadata.block_tables[is_needed],
            metadata.seq_lens - (num_blocks - 1) * block_size,
            q.shape[1],
            num_kv_heads,
            head_size,
            block_size,
            causal=True,
            sm_scale=scale,
            window_left=-1 if sliding_window is None else sliding_window - 1,
            q_data_type=q.dtype,
            kv_data_type=k_cache.dtype,
        )
        return wrapper
