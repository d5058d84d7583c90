"""What a layer does beside attention and products, in Triton, for GPUs: one kernel each instead of three to eight.

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block; D size
of what is normalised; F intermediate size.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

_HEADS_AT_ONCE = 8
_COLUMNS_AT_ONCE = 1024


def is_interpreted() -> bool:
    """Return whether Triton's interpreter runs the kernels, on a CPU and for tests, rather than a GPU."""
    return bool(triton.knobs.runtime.interpret)


def rms_norm(x: Tensor, residual: Tensor | None, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum of x and residual, and the sum, all [..., D]; without a residual x itself.

    Args:
        x: [..., D]; `residual` likewise.
        weight: [D].
        eps: Added to the mean square.
    """
    size = x.shape[-1]
    x = x.contiguous()
    y = torch.empty_like(x)
    total = x
    if residual is not None:
        residual = residual.contiguous()
        total = torch.empty_like(x)
    _rms_norm[(x.numel() // size,)](
        x,
        x if residual is None else residual,
        weight,
        y,
        total,
        eps,
        SIZE=size,
        SIZE_PAD=triton.next_power_of_2(size),
        HAS_RESIDUAL=residual is not None,
        num_warps=8 if size > 2048 else 4,
    )
    return y, total


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, F], of gate and up side by side, [T, 2 * F]."""
    gate_up = gate_up.contiguous()
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    y = torch.empty((num_rows, size), dtype=gate_up.dtype, device=gate_up.device)
    _silu_mul[(num_rows, triton.cdiv(size, _COLUMNS_AT_ONCE))](gate_up, y, size, COLUMNS=_COLUMNS_AT_ONCE)
    return y


def rotate_and_write(
    qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, slot_mapping: Tensor
) -> Tensor:
    """Rotate queries and keys, and store keys and values in their slots, in place.

    Args:
        qkv: Queries, keys and values of each token, [T, N + 2 K, H], contiguous; the queries are rotated in place.
        k_cache: Key pool, [P, S, K, H], contiguous; `v_cache` likewise.
        cos: [T, 1, H / 2] float32; `sin` likewise.
        slot_mapping: Block id * S + offset of each token, [T] int32; less than 0 for one that is not stored.

    Returns:
        The queries, [T, N, H], a part of qkv.
    """
    num_tokens, num_all, head_size = qkv.shape
    num_kv_heads = k_cache.shape[2]
    assert qkv.is_contiguous() and k_cache.is_contiguous() and v_cache.is_contiguous(), qkv.stride()
    _rotate_and_write[(num_tokens, triton.cdiv(num_all, _HEADS_AT_ONCE))](
        qkv,
        k_cache,
        v_cache,
        cos,
        sin,
        slot_mapping,
        NUM_HEADS=num_all - 2 * num_kv_heads,
        NUM_KV_HEADS=num_kv_heads,
        HALF=head_size // 2,
        HALF_PAD=triton.next_power_of_2(head_size // 2),
        HEADS_AT_ONCE=_HEADS_AT_ONCE,
        num_warps=1,
    )
    return qkv[:, : num_all - 2 * num_kv_heads]


@triton.jit
def _rms_norm(
    x_ptr,
    residual_ptr,
    weight_ptr,
    y_ptr,
    total_ptr,
    eps,
    SIZE: tl.constexpr,
    SIZE_PAD: tl.constexpr,
    HAS_RESIDUAL: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * SIZE
    column = tl.arange(0, SIZE_PAD)
    is_column = column < SIZE
    x = tl.load(x_ptr + row + column, mask=is_column, other=0.0).to(tl.float32)
    if HAS_RESIDUAL:
        x += tl.load(residual_ptr + row + column, mask=is_column, other=0.0).to(tl.float32)
        # The norm is that of the sum as it is stored.
        total = x.to(total_ptr.dtype.element_ty)
        tl.store(total_ptr + row + column, total, mask=is_column)
        x = total.to(tl.float32)
    scale = tl.rsqrt(tl.sum(x * x, 0) / SIZE + eps)
    weight = tl.load(weight_ptr + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(y_ptr + row + column, (x * scale * weight).to(y_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _silu_mul(gate_up_ptr, y_ptr, size, COLUMNS: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * COLUMNS + tl.arange(0, COLUMNS)
    is_column = column < size
    gate = tl.load(gate_up_ptr + row * 2 * size + column, mask=is_column, other=0.0).to(tl.float32)
    up = tl.load(gate_up_ptr + row * 2 * size + size + column, mask=is_column, other=0.0).to(tl.float32)
    tl.store(y_ptr + row * size + column, (gate * tl.sigmoid(gate) * up).to(y_ptr.dtype.element_ty), mask=is_column)


@triton.jit
def _rotate_and_write(
    qkv_ptr,
    k_cache_ptr,
    v_cache_ptr,
    cos_ptr,
    sin_ptr,
    slots_ptr,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HALF: tl.constexpr,
    HALF_PAD: tl.constexpr,
    HEADS_AT_ONCE: tl.constexpr,
):
    """Take HEADS_AT_ONCE of a token's heads."""
    token = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1) * HEADS_AT_ONCE + tl.arange(0, HEADS_AT_ONCE)
    pair = tl.arange(0, HALF_PAD)
    is_pair = pair < HALF
    size: tl.constexpr = 2 * HALF
    num_rotated: tl.constexpr = NUM_HEADS + NUM_KV_HEADS
    num_all: tl.constexpr = NUM_HEADS + 2 * NUM_KV_HEADS

    cos = tl.load(cos_ptr + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
    sin = tl.load(sin_ptr + token * HALF + pair, mask=is_pair, other=0.0)[None, :]
    place = (token * num_all + head)[:, None] * size + pair[None, :]
    is_there = (head < num_all)[:, None] & is_pair[None, :]
    first = tl.load(qkv_ptr + place, mask=is_there, other=0.0).to(tl.float32)
    second = tl.load(qkv_ptr + place + HALF, mask=is_there, other=0.0).to(tl.float32)
    is_rotated = (head < num_rotated)[:, None]
    turned = tl.where(is_rotated, first * cos - second * sin, first)
    second = tl.where(is_rotated, second * cos + first * sin, second)

    is_query = is_there & (head < NUM_HEADS)[:, None]
    tl.store(qkv_ptr + place, turned.to(qkv_ptr.dtype.element_ty), mask=is_query)
    tl.store(qkv_ptr + place + HALF, second.to(qkv_ptr.dtype.element_ty), mask=is_query)
    slot = tl.load(slots_ptr + token).to(tl.int64)
    is_key = is_there & ((head >= NUM_HEADS) & (head < num_rotated) & (slot >= 0))[:, None]
    key_place = (slot * NUM_KV_HEADS + head - NUM_HEADS)[:, None] * size + pair[None, :]
    tl.store(k_cache_ptr + key_place, turned.to(k_cache_ptr.dtype.element_ty), mask=is_key)
    tl.store(k_cache_ptr + key_place + HALF, second.to(k_cache_ptr.dtype.element_ty), mask=is_key)
    is_value = is_there & ((head >= num_rotated) & (slot >= 0))[:, None]
    value_place = (slot * NUM_KV_HEADS + head - num_rotated)[:, None] * size + pair[None, :]
    tl.store(v_cache_ptr + value_place, turned.to(v_cache_ptr.dtype.element_ty), mask=is_value)
    tl.store(v_cache_ptr + value_place + HALF, second.to(v_cache_ptr.dtype.element_ty), mask=is_value)
