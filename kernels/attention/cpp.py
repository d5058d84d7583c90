"""Attention in C++, for CPUs: one pass over the keys for all rows of a step, without a gather.

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.native import load_library
from rayserve_sarathi.kernels.rotary import rotate_qkv

_GROUP = 16


class CppAttention:
    """Chunks and decodes in one call. Of a KV head a block holds its keys as [H, S] and its values as [S, H].

    Raises:
        NativeBuildError: There is no build of the kernels for this machine.
    """

    is_graphable = False
    is_in_layers = True

    def __init__(self) -> None:
        library = load_library()
        self._attention = library.sarathi_attention
        self._write_kv = library.sarathi_write_kv
        self._lanes: int = library.sarathi_lanes()

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `AttentionBackend`."""
        if device.type != "cpu":
            return f"it is for CPUs, not {device.type}"
        if dtype not in (torch.float32, torch.bfloat16):
            return f"it computes in float32 and bfloat16, not {str(dtype).removeprefix('torch.')}"
        if block_size % _GROUP:
            return f"block_size must be a multiple of {_GROUP}, got {block_size}"
        if head_size % self._lanes:
            return f"the head size must be a multiple of {self._lanes} on this CPU, got {head_size}"
        return None

    def kv_cache_shape(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, int, int, int]:
        """Return [P, K, S, H], in which the order of a head's keys is another; see the class."""
        return (num_blocks, num_kv_heads, block_size, head_size)

    def rotate_and_write(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Rotate queries and keys, store keys and values; see `AttentionBackend.rotate_and_write`."""
        _, num_kv_heads, block_size, head_size = k_cache.shape
        q, k, v = rotate_qkv(qkv, cos, sin, num_kv_heads=num_kv_heads)
        k, v = _with_heads_together(k), _with_heads_together(v)
        slots, new_blocks = metadata.slot_mapping, metadata.new_block_ids
        self._write_kv(
            *(k.data_ptr(), k.stride(0), v.data_ptr(), v.stride(0), k_cache.data_ptr(), v_cache.data_ptr()),
            k_cache.dtype == torch.bfloat16,
            *(slots.data_ptr(), len(slots), new_blocks.data_ptr(), len(new_blocks)),
            *(num_kv_heads, head_size, block_size),
        )
        return q

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
        _, num_kv_heads, block_size, head_size = k_cache.shape
        num_tokens, num_heads = q.shape[:2]
        rows = _with_heads_together(q.float())
        out = torch.empty((num_tokens, num_heads, head_size), dtype=torch.float32)
        tables = metadata.block_tables
        self._attention(
            *(rows.data_ptr(), rows.stride(0), k_cache.data_ptr(), v_cache.data_ptr()),
            k_cache.dtype == torch.bfloat16,
            *(out.data_ptr(), metadata.cu_query_lens.data_ptr(), metadata.seq_lens.data_ptr()),
            *(tables.data_ptr(), tables.stride(0), len(metadata.seq_lens)),
            *(num_heads, num_kv_heads, head_size, block_size, scale, sliding_window or 0),
        )
        return out.to(q.dtype)


def _with_heads_together(x: Tensor) -> Tensor:
    """Return x, [T, heads, H], with the heads of a token one after the other in memory."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
