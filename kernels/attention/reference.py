"""Attention in plain torch: the reference for other backends, and a fair backend for CPUs.

Dimensions: T tokens in the step; N query and K KV heads; G = N / K; H head size; P blocks in the pool; S tokens per
block; B decodes in a group; L keys.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, ChunkPiece, DecodeGroup
from rayserve_sarathi.kernels.kv_write import write_kv
from rayserve_sarathi.kernels.rotary import rotate_qkv


class TorchAttention:
    """Decodes in padded groups, chunks one by one, both by torch's scaled dot-product attention.

    Pools are [P, K, S, H]: gathering blocks of whole heads yields [K, L, H] without a transposition, which made decode
    attention 1.6 times as fast on a CPU as [P, S, K, H].
    """

    is_graphable = False
    is_in_layers = False

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """Return None: it attends on any device, in any type."""
        return None

    def kv_cache_shape(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, int, int, int]:
        """Return [P, K, S, H]."""
        return (num_blocks, num_kv_heads, block_size, head_size)

    def rotate_and_write(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Rotate queries and keys, store keys and values; see `AttentionBackend.rotate_and_write`."""
        q, k, v = rotate_qkv(qkv, cos, sin, num_kv_heads=k_cache.shape[1])
        write_kv(k, v, k_cache, v_cache, slot_mapping=metadata.slot_mapping, new_block_ids=metadata.new_block_ids)
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
        """Attend from each token to its request's tokens up to itself; see `AttentionBackend.attention`.

        Args:
            q: Queries, [T, N, H].
            k_cache: Key pool, [P, K, S, H]; `v_cache` likewise.
            metadata: The step.
            scale: Factor of the scores.
            sliding_window: Tokens that a token sees, itself included; None for all.

        Returns:
            [T, N, H].
        """
        out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
        for group in metadata.decode_groups:
            out[group.rows] = _attend_decodes(q[group.rows], k_cache, v_cache, group, scale, sliding_window)
        for piece in metadata.chunk_pieces:
            tokens = slice(piece.start, piece.start + piece.query_len)
            out[tokens] = _attend_chunk(q[tokens], k_cache, v_cache, piece, scale, sliding_window)
        return out


def _attend_decodes(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, group: DecodeGroup, scale: float, sliding_window: int | None
) -> Tensor:
    """Attend from the single token of each of B requests, [B, N, H] to [B, N, H]."""
    num_kv_heads, block_size = k_cache.shape[1:3]
    block_ids = group.block_ids
    num_blocks = block_ids.shape[1]
    if sliding_window is None:
        first_block = torch.zeros_like(group.seq_lens)
    else:
        first_block = (group.seq_lens - sliding_window).clamp(min=0) // block_size
        num_blocks = min(num_blocks, (sliding_window + block_size - 2) // block_size + 1)
        column = first_block + torch.arange(num_blocks, device=q.device)
        # A column past the table stands for positions past the request's end, which the mask hides.
        block_ids = block_ids.gather(1, column.clamp(max=block_ids.shape[1] - 1))

    position = first_block * block_size + torch.arange(num_blocks * block_size, device=q.device)
    is_visible = position < group.seq_lens
    if sliding_window is not None:
        is_visible &= position >= group.seq_lens - sliding_window
    # The G query heads of a KV head take the place of G queries: [B, K, G, H] against [B, K, L, H].
    out = F.scaled_dot_product_attention(
        q.reshape(len(q), num_kv_heads, -1, q.shape[-1]),
        _gather_heads(k_cache, block_ids),
        _gather_heads(v_cache, block_ids),
        attn_mask=is_visible[:, None, None, :],
        scale=scale,
    )
    return out.flatten(1, 2)


def _attend_chunk(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, piece: ChunkPiece, scale: float, sliding_window: int | None
) -> Tensor:
    """Attend from successive tokens of one request, [query_len, N, H] to the same."""
    block_size = k_cache.shape[2]
    seq_len = piece.context_len + piece.query_len
    is_windowed = sliding_window is not None and sliding_window < seq_len
    first_block = max(0, piece.context_len + 1 - sliding_window) // block_size if sliding_window is not None else 0
    first_key = first_block * block_size
    block_ids = piece.block_ids[None, first_block:]
    mask = None
    if piece.context_len > 0 or is_windowed:
        query_position = torch.arange(piece.context_len, seq_len, device=q.device)[:, None]
        key_position = torch.arange(first_key, seq_len, device=q.device)
        mask = key_position <= query_position
        if sliding_window is not None:
            mask &= key_position > query_position - sliding_window
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None],
        _gather_heads(k_cache, block_ids)[:, :, : seq_len - first_key],
        _gather_heads(v_cache, block_ids)[:, :, : seq_len - first_key],
        attn_mask=mask,
        is_causal=mask is None,
        scale=scale,
        enable_gqa=True,
    )
    return out[0].transpose(0, 1)


def _gather_heads(cache: Tensor, block_ids: Tensor) -> Tensor:
    """Gather blocks, [B, n] int64, of a pool [P, K, S, H] into [B, K, n * S, H]."""
    num_kv_heads, _, head_size = cache.shape[1:]
    heads = torch.arange(num_kv_heads, device=cache.device)[:, None]
    rows = block_ids[:, None, :] * num_kv_heads + heads
    gathered = cache.flatten(0, 1).index_select(0, rows.flatten())
    return gathered.view(block_ids.shape[0], num_kv_heads, -1, head_size)
