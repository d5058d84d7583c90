"""Attention by the package flashinfer (Ye et al., 2025).

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

import torch
from flashinfer import BatchPrefillWithPagedKVCacheWrapper
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.attention.token_major import TokenMajorCache

# For partial results of split contexts; what its documentation advises.
_WORKSPACE_BYTES = 128 * 2**20


class FlashInferAttention(TokenMajorCache):
    """Attention by flashinfer's wrapper for paged prefills, which decodes are too. A block holds keys as [S, K, H].

    It plans each step on the host, once for all layers with the same window.
    """

    def __init__(self) -> None:
        # By window: a wrapper, whose buffers serve every step, and the step that it has planned last.
        self._wrappers: dict[int | None, BatchPrefillWithPagedKVCacheWrapper] = {}
        self._planned: dict[int | None, AttentionMetadata] = {}

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `AttentionBackend`."""
        if device.type != "cuda":
            return f"it is for GPUs, not {device.type}"
        if dtype not in (torch.float16, torch.bfloat16):
            return f"it computes in float16 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if head_size not in (64, 128, 256):
            return f"the head size must be 64, 128 or 256, got {head_size}"
        return None

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
        if sliding_window not in self._wrappers:
            workspace = torch.zeros(_WORKSPACE_BYTES, dtype=torch.uint8, device=q.device)
            self._wrappers[sliding_window] = BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
        wrapper = self._wrappers[sliding_window]
        if self._planned.get(sliding_window) is not metadata:
            _plan(wrapper, q, k_cache, metadata=metadata, scale=scale, sliding_window=sliding_window)
            self._planned[sliding_window] = metadata
        out: Tensor = wrapper.run(q, (k_cache, v_cache))
        return out


def _plan(
    wrapper: BatchPrefillWithPagedKVCacheWrapper,
    q: Tensor,
    k_cache: Tensor,
    *,
    metadata: AttentionMetadata,
    scale: float,
    sliding_window: int | None,
) -> None:
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
