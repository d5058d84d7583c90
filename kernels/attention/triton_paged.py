"""Attention in Triton, for GPUs: chunks and decodes in one launch over the paged keys, without a gather.

An online softmax over tiles of keys (FlashAttention-2; Dao, 2023), with the query heads that share a KV head side by
side in a tile, as multi-query decoding is bound by reading keys. Steps of decodes alone split long contexts over
several programs and merge what they find (Flash-Decoding; Dao et al., 2023).

Dimensions: T tokens in the step; R requests; N query and K KV heads; G = N / K; H head size; P blocks in the pool;
S tokens per block; M longest block table.
"""

import math
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.attention.token_major import TokenMajorCache
from rayserve_sarathi.kernels.fused import is_interpreted

# On an H200 parts of contexts pay where there are fewer programs than this for each multiprocessor.
_PROGRAMS_PER_MULTIPROCESSOR = 2
_MAX_SPLITS = 32


@dataclass(frozen=True, slots=True, kw_only=True)
class Tiling:
    """How a launch cuts its work.

    Args:
        rows: Queries times G in a tile, at least 16; a power of two.
        keys: Keys in a tile, at least 16; a power of two.
        num_splits: Parts of each context, at most 32, a power of two; 1 but for decodes.
        num_warps: Of a program.
        num_stages: Tiles of keys and values that are under way.
    """

    rows: int
    keys: int
    num_splits: int
    num_warps: int
    num_stages: int


class TritonAttention(TokenMajorCache):
    """Chunks and decodes in one call. A block holds keys, and values, as [S, K, H], as flash-attn's do."""

    is_graphable = True

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        """See `AttentionBackend`."""
        if device.type != "cuda" and not is_interpreted():
            return f"it is for GPUs, not {device.type}"
        if head_size > 256:
            return f"the head size must be at most 256, got {head_size}"
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
        return paged_attention(
            q,
            k_cache,
            v_cache,
            cu_query_lens=metadata.cu_query_lens,
            seq_lens=metadata.seq_lens,
            block_tables=metadata.block_tables,
            has_chunks=metadata.has_chunks,
            scale=scale,
            sliding_window=sliding_window,
        )


def paged_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    *,
    cu_query_lens: Tensor,
    seq_lens: Tensor,
    block_tables: Tensor,
    has_chunks: bool,
    scale: float,
    sliding_window: int | None,
    tiling: Tiling | None = None,
) -> Tensor:
    """Attend from each token to its request's tokens up to itself.

    What the launch looks like follows from shapes alone, so that a CUDA graph of it holds for any lengths. Requests
    without a token in the step, which fill up such a graph, cost next to nothing.

    Args:
        q: Queries, [T, N, H], of which only the last dimension must be contiguous.
        k_cache: Key pool, [P, S, K, H], contiguous; `v_cache` likewise.
        cu_query_lens: First token of each request, and T, [R + 1] int32.
        seq_lens: [R] int32; 0 for a request that only fills up, whose output is 0.
        block_tables: [R, M] int32.
        has_chunks: Whether any request has more than one token; without, token i is request i's.
        scale: Factor of the scores.
        sliding_window: Tokens that a token sees, itself included; None for all.
        tiling: None chooses one for the GPU.

    Returns:
        [T, N, H], contiguous.
    """
    num_tokens, num_heads, head_size = q.shape
    block_size, num_kv_heads = k_cache.shape[1:3]
    group, num_requests = num_heads // num_kv_heads, len(seq_lens)
    assert q.stride(2) == 1 and k_cache.is_contiguous() and v_cache.is_contiguous(), (q.stride(), k_cache.stride())
    if tiling is None:
        tiling = choose_tiling(
            group=group,
            head_size=head_size,
            num_programs=num_requests * num_kv_heads,
            max_keys=min(block_tables.shape[1] * block_size, sliding_window or 2**31),
            has_chunks=has_chunks,
            device=q.device,
        )
    num_queries = tiling.rows // group
    # A request has at most one tile that is not full: this is enough, and a tile finds its request in the kernel.
    num_tiles = num_tokens // num_queries + num_requests if has_chunks else num_requests
    out = torch.empty((num_tokens, num_heads, head_size), dtype=q.dtype, device=q.device)
    is_split = tiling.num_splits > 1
    assert not (is_split and has_chunks), tiling
    parts = sums = out
    if is_split:
        parts = q.new_empty((num_tokens, num_heads, tiling.num_splits, head_size), dtype=torch.float32)
        sums = q.new_empty((num_tokens, num_heads, tiling.num_splits, 2), dtype=torch.float32)
    head_pad = triton.next_power_of_2(head_size)
    _attend[(num_tiles, num_kv_heads, tiling.num_splits)](
        q,
        k_cache,
        v_cache,
        parts if is_split else out,
        sums,
        cu_query_lens,
        seq_lens,
        block_tables,
        scale * math.log2(math.e),
        num_requests,
        q.stride(0),
        q.stride(1),
        block_tables.stride(0),
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD=head_size,
        HEAD_PAD=head_pad,
        BLOCK_SIZE=block_size,
        ROWS=tiling.rows,
        QUERIES=num_queries,
        KEYS=tiling.keys,
        WINDOW=sliding_window or 0,
        SPLITS=tiling.num_splits,
        REQUESTS=triton.next_power_of_2(num_requests) if has_chunks else 0,
        IN_FLOAT32=q.dtype == torch.float32 or is_interpreted(),
        num_warps=tiling.num_warps,
        num_stages=tiling.num_stages,
    )
    if is_split:
        _merge[(num_tokens, num_heads)](
            parts,
            sums,
            out,
            HEADS=num_heads,
            HEAD=head_size,
            HEAD_PAD=head_pad,
            SPLITS=tiling.num_splits,
            num_warps=2,
        )
    return out


def choose_tiling(
    *, group: int, head_size: int, num_programs: int, max_keys: int, has_chunks: bool, device: torch.device
) -> Tiling:
    """Return the tiling for a step.

    Args:
        group: G.
        head_size: H.
        num_programs: Programs of a step of decodes whose contexts are whole.
        max_keys: Most keys that a decode may attend to.
        has_chunks: Whether any request has more than one token.
        device: Of the tensors.
    """
    least_rows = max(16, triton.next_power_of_2(group))
    if has_chunks:
        # Four warps with 64 rows spill registers on an A100 (compute capability 8).
        is_hopper = device.type != "cuda" or torch.cuda.get_device_capability(device)[0] >= 9
        rows, num_warps = (64, 4) if is_hopper else (128, 8)
        return Tiling(
            rows=max(least_rows, rows),
            keys=64 if head_size <= 128 else 32,
            num_splits=1,
            num_warps=num_warps if least_rows <= rows else 8,
            num_stages=2,
        )
    keys = 64 if head_size <= 128 else 32
    multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 2
    wanted = _PROGRAMS_PER_MULTIPROCESSOR * multiprocessors // num_programs
    # A part of fewer keys than two tiles costs more to merge than it saves.
    num_splits = max(1, min(wanted, max_keys // (2 * keys), _MAX_SPLITS))
    # With three stages it took half as long again on an H200: more shared memory, and fewer programs at a time.
    return Tiling(rows=least_rows, keys=keys, num_splits=1 << (num_splits.bit_length() - 1), num_warps=4, num_stages=2)


@triton.jit
def _attend(
    q_ptr,
    k_ptr,
    v_ptr,
    out_ptr,
    sums_ptr,
    first_tokens_ptr,
    seq_lens_ptr,
    tables_ptr,
    scale_log2,
    num_requests,
    q_token_stride,
    q_head_stride,
    table_stride,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    ROWS: tl.constexpr,
    QUERIES: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    SPLITS: tl.constexpr,
    REQUESTS: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
):
    """Attend from QUERIES tokens of a request, with the GROUP heads of a KV head, to a part of its keys."""
    tile = tl.program_id(0)
    kv_head = tl.program_id(1)
    split = tl.program_id(2)
    request = tile
    query = 0
    if REQUESTS > 0:
        # Request r has the tiles from first_token(r) // QUERIES + r on.
        every = tl.arange(0, REQUESTS)
        first_tiles = tl.load(first_tokens_ptr + every, mask=every < num_requests, other=0) // QUERIES + every
        request = tl.sum(((first_tiles <= tile) & (every < num_requests)).to(tl.int32), 0) - 1
        query = (tile - request - tl.load(first_tokens_ptr + request) // QUERIES) * QUERIES
    first_token = tl.load(first_tokens_ptr + request)
    query_len = tl.load(first_tokens_ptr + request + 1) - first_token
    if query >= query_len:
        return
    seq_len = tl.load(seq_lens_ptr + request)
    context_len = seq_len - query_len

    row = tl.arange(0, ROWS)
    dim = tl.arange(0, HEAD_PAD)
    row_query = query + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < QUERIES * GROUP) & (row_query < query_len)
    is_dim = dim < HEAD
    token = (first_token + row_query).to(tl.int64)
    q = tl.load(
        q_ptr + token[:, None] * q_token_stride + head[:, None] * q_head_stride + dim[None, :],
        mask=is_row[:, None] & is_dim[None, :],
        other=0.0,
    )
    if IN_FLOAT32:
        q = q.to(tl.float32)
    position = context_len + row_query

    # Keys [begin, end) of which those before `masked` are seen by each row.
    begin = 0
    end = tl.minimum(context_len + query + QUERIES, seq_len)
    if WINDOW > 0:
        begin = tl.maximum(context_len + query - WINDOW + 1, 0) // KEYS * KEYS
    if SPLITS > 1:
        part = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
        begin += split * part
        end = tl.minimum(end, begin + part)
    masked = begin
    if WINDOW == 0:
        masked = tl.maximum(begin, tl.minimum(context_len + query + 1, end) // KEYS * KEYS)

    table_ptr = tables_ptr + request.to(tl.int64) * table_stride
    keys_ptr = k_ptr + kv_head * HEAD
    values_ptr = v_ptr + kv_head * HEAD
    largest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.zeros([ROWS], tl.float32)
    acc = tl.zeros([ROWS, HEAD_PAD], tl.float32)
    for first_key in range(begin, masked, KEYS):
        largest, total, acc = _attend_tile(
            first_key, end, q, position, largest, total, acc, table_ptr, keys_ptr, values_ptr, scale_log2,
            NUM_KV_HEADS, HEAD, HEAD_PAD, BLOCK_SIZE, KEYS, WINDOW, IN_FLOAT32, False,
        )  # fmt: skip
    for first_key in range(masked, end, KEYS):
        largest, total, acc = _attend_tile(
            first_key, end, q, position, largest, total, acc, table_ptr, keys_ptr, values_ptr, scale_log2,
            NUM_KV_HEADS, HEAD, HEAD_PAD, BLOCK_SIZE, KEYS, WINDOW, IN_FLOAT32, True,
        )  # fmt: skip

    out_row = token * (GROUP * NUM_KV_HEADS) + head
    is_out = is_row[:, None] & is_dim[None, :]
    if SPLITS == 1:
        acc = acc / tl.where(total > 0, total, 1.0)[:, None]
        tl.store(out_ptr + out_row[:, None] * HEAD + dim[None, :], acc.to(out_ptr.dtype.element_ty), mask=is_out)
    else:
        out_row = out_row * SPLITS + split
        tl.store(out_ptr + out_row[:, None] * HEAD + dim[None, :], acc, mask=is_out)
        tl.store(sums_ptr + out_row * 2, largest, mask=is_row)
        tl.store(sums_ptr + out_row * 2 + 1, total, mask=is_row)


@triton.jit
def _attend_tile(
    first_key,
    end,
    q,
    position,
    largest,
    total,
    acc,
    table_ptr,
    keys_ptr,
    values_ptr,
    scale_log2,
    NUM_KV_HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    KEYS: tl.constexpr,
    WINDOW: tl.constexpr,
    IN_FLOAT32: tl.constexpr,
    IS_MASKED: tl.constexpr,
):
    """Take KEYS keys into the running softmax: its largest score, its total, and the weighted sum of values."""
    key = first_key + tl.arange(0, KEYS)
    dim = tl.arange(0, HEAD_PAD)
    # What lies past a request's end is none of its business and may be NaN: it is not even loaded.
    is_key = (key < end) if IS_MASKED else (key >= 0)
    is_dim = dim < HEAD
    block = tl.load(table_ptr + key // BLOCK_SIZE, mask=is_key, other=0).to(tl.int64)
    slot = (block * BLOCK_SIZE + key % BLOCK_SIZE) * (NUM_KV_HEADS * HEAD)
    k = tl.load(keys_ptr + slot[None, :] + dim[:, None], mask=is_key[None, :] & is_dim[:, None], other=0.0)
    v = tl.load(values_ptr + slot[:, None] + dim[None, :], mask=is_key[:, None] & is_dim[None, :], other=0.0)
    if IN_FLOAT32:
        k = k.to(tl.float32)
        v = v.to(tl.float32)
        score = tl.dot(q, k, input_precision="ieee") * scale_log2
    else:
        score = tl.dot(q, k) * scale_log2
    if IS_MASKED:
        is_seen = (key[None, :] <= position[:, None]) & is_key[None, :]
        if WINDOW > 0:
            is_seen = is_seen & (position[:, None] - key[None, :] < WINDOW)
        score = tl.where(is_seen, score, float("-inf"))
    new_largest = tl.maximum(largest, tl.max(score, 1))
    # A row that has seen no key yet: its largest score is -inf, and -inf - -inf is NaN.
    base = tl.where(new_largest == float("-inf"), 0.0, new_largest)
    weight = tl.exp2(score - base[:, None])
    rescale = tl.exp2(largest - base)
    total = total * rescale + tl.sum(weight, 1)
    acc = acc * rescale[:, None]
    if IN_FLOAT32:
        acc += tl.dot(weight, v, input_precision="ieee")
    else:
        acc += tl.dot(weight.to(v.dtype), v)
    return new_largest, total, acc


@triton.jit
def _merge(
    parts_ptr,
    sums_ptr,
    out_ptr,
    HEADS: tl.constexpr,
    HEAD: tl.constexpr,
    HEAD_PAD: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Add up what the programs of the parts of a context found for a token's head."""
    row = tl.program_id(0).to(tl.int64) * HEADS + tl.program_id(1)
    part = row * SPLITS + tl.arange(0, SPLITS)
    dim = tl.arange(0, HEAD_PAD)
    largest = tl.load(sums_ptr + part * 2)
    total = tl.load(sums_ptr + part * 2 + 1)
    base = tl.max(largest, 0)
    scale = tl.where(largest == float("-inf"), 0.0, tl.exp2(largest - base))
    acc = tl.load(parts_ptr + part[:, None] * HEAD + dim[None, :], mask=(dim < HEAD)[None, :], other=0.0)
    whole = tl.sum(scale * total, 0)
    out = tl.sum(acc * scale[:, None], 0) / tl.where(whole > 0, whole, 1.0)
    tl.store(out_ptr + row * HEAD + dim, out.to(out_ptr.dtype.element_ty), mask=dim < HEAD)
