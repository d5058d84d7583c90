"""Triton's kernels beside the plain ones, in its interpreter (see conftest.py)."""

import pytest
import torch

from rayserve_sarathi.kernels import rms_norm as plain_norm
from rayserve_sarathi.kernels import silu_mul as plain_silu
from rayserve_sarathi.kernels.rotary import apply_rotary, inverse_frequencies, rotary_cos_sin

fused = pytest.importorskip("rayserve_sarathi.kernels.fused", reason="there is no Triton")

TYPES = (torch.float32, torch.bfloat16)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("size", [16, 100])
def test_rms_norm(size: int, dtype: torch.dtype) -> None:
    x, weight = torch.randn(3, 2, size, dtype=dtype), torch.randn(size, dtype=dtype)

    y, total = fused.rms_norm(x, None, weight, eps=1e-5)

    assert total is x
    torch.testing.assert_close(y, plain_norm.rms_norm(x, weight, eps=1e-5))


@pytest.mark.parametrize("dtype", TYPES)
def test_rms_norm_with_a_residual_is_that_of_the_sum_as_stored(dtype: torch.dtype) -> None:
    x, residual, weight = (torch.randn(shape, dtype=dtype) for shape in ((3, 100), (3, 100), (100,)))

    y, total = fused.rms_norm(x, residual, weight, eps=1e-5)

    torch.testing.assert_close(total, x + residual)  # the interpreter rounds to bfloat16 in its own way
    torch.testing.assert_close(y, plain_norm.rms_norm(x + residual, weight, eps=1e-5))


@pytest.mark.parametrize("dtype", TYPES)
def test_silu_mul_of_rows_longer_than_a_program_takes(dtype: torch.dtype) -> None:
    gate_up = 5 * torch.randn(3, 2 * 1500, dtype=dtype)
    expected = plain_silu.silu_mul(gate_up.float())

    torch.testing.assert_close(fused.silu_mul(gate_up), expected.to(dtype))


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_size"), [(4, 2, 16), (9, 3, 80), (7, 1, 64)])
def test_rotate_and_write(num_heads: int, num_kv_heads: int, head_size: int, dtype: torch.dtype) -> None:
    slots = torch.tensor([5, 0, 11, -1], dtype=torch.int32)
    qkv = torch.randn(4, num_heads + 2 * num_kv_heads, head_size, dtype=dtype)
    cos, sin = rotary_cos_sin(
        torch.tensor([3, 0, 90, 7]), inverse_frequencies(head_size, theta=1e4), attention_factor=1
    )
    q, k, v = qkv.split((num_heads, num_kv_heads, num_kv_heads), dim=1)
    expected_q, expected_k, expected_v = apply_rotary(q.clone(), cos, sin), apply_rotary(k.clone(), cos, sin), v.clone()
    caches = [torch.full((3, 4, num_kv_heads, head_size), -7.0, dtype=dtype) for _ in range(2)]

    rotated = fused.rotate_and_write(qkv, *caches, cos=cos, sin=sin, slot_mapping=slots)

    torch.testing.assert_close(rotated, expected_q)
    for cache, expected in zip(caches, (expected_k, expected_v), strict=True):
        by_slot = cache.view(12, num_kv_heads, head_size)
        torch.testing.assert_close(by_slot[[5, 0, 11]], expected[:3])
        assert (by_slot[[1, 2, 3, 4, 6, 7, 8, 9, 10]] == -7).all()
