"""The small kernels against their definitions in float64; rotary scalings are checked against transformers."""

import pytest
import torch

from rayserve_sarathi.kernels.layer_norm import layer_norm
from rayserve_sarathi.kernels.rms_norm import add_rms_norm, rms_norm
from rayserve_sarathi.kernels.rotary import apply_rotary, inverse_frequencies, rotary_cos_sin
from rayserve_sarathi.kernels.silu_mul import silu_mul

# In whole vectors of any CPU, and not.
SIZES = [8, 12, 96, 256]


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("num_rows", [1, 3, 200])
def test_rms_norm(size: int, num_rows: int) -> None:
    x, weight = torch.randn(num_rows, 2, size), torch.randn(size)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), expected.float())
    torch.testing.assert_close(rms_norm(x[:, :1], weight, eps=1e-3), expected[:, :1].float())


def test_layer_norm() -> None:
    x, weight, bias = torch.randn(3, 2, 8), torch.randn(8), torch.randn(8)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias

    torch.testing.assert_close(layer_norm(x, weight, bias, eps=1e-3), expected.float())


@pytest.mark.parametrize("size", SIZES)
def test_add_rms_norm_returns_norm_and_sum(size: int) -> None:
    x, residual, weight = torch.randn(3, size), torch.randn(3, size), torch.randn(size)

    normed, total = add_rms_norm(x, residual, weight, eps=1e-5)

    assert torch.equal(total, x + residual)
    torch.testing.assert_close(normed, rms_norm(x + residual, weight, eps=1e-5))


@pytest.mark.parametrize("size", SIZES)
def test_silu_mul(size: int) -> None:
    gate, up = 30 * torch.randn(3, size), torch.randn(3, size)
    gate[0, :4] = torch.tensor([0.0, 100.0, -100.0, -1e30])
    expected = gate.double() * gate.double().sigmoid() * up

    torch.testing.assert_close(silu_mul(torch.cat((gate, up), dim=1)), expected.float())


def test_silu_mul_keeps_what_is_not_finite_in_its_place() -> None:
    gate, up = torch.ones(1, 32), torch.ones(1, 32)
    gate[0, 5] = torch.nan

    assert silu_mul(torch.cat((gate, up), dim=1)).isnan().nonzero().tolist() == [[0, 5]]


def test_rotary_of_a_part_of_wider_rows_leaves_the_rest() -> None:
    wide = torch.randn(4, 5, 16)
    before = wide.clone()
    angles = rotary_cos_sin(torch.arange(4), inverse_frequencies(16, theta=100.0), attention_factor=1.0)

    rotated = apply_rotary(wide[:, :3], *angles)

    torch.testing.assert_close(rotated, apply_rotary(before[:, :3].contiguous(), *angles))
    assert torch.equal(wide[:, 3:], before[:, 3:])


def test_rotary_turns_each_pair_by_its_angle() -> None:
    x = torch.randn(2, 3, 8)
    frequencies = inverse_frequencies(8, theta=100.0)
    cos, sin = rotary_cos_sin(torch.tensor([0, 5]), frequencies, attention_factor=1.0)

    rotated = apply_rotary(x.clone(), cos, sin)

    as_complex = torch.complex(x[..., :4], x[..., 4:]) * torch.polar(torch.ones(4), 5 * frequencies)
    torch.testing.assert_close(rotated[0], x[0])
    torch.testing.assert_close(rotated[1], torch.cat((as_complex[1].real, as_complex[1].imag), dim=-1))


def test_scores_of_rotated_queries_and_keys_depend_on_their_distance_alone() -> None:
    q, k = torch.randn(1, 1, 8).expand(2, 1, 8), torch.randn(1, 1, 8).expand(2, 1, 8)
    frequencies = inverse_frequencies(8, theta=10000.0)
    q_angles = rotary_cos_sin(torch.tensor([7, 107]), frequencies, attention_factor=1.0)
    k_angles = rotary_cos_sin(torch.tensor([4, 104]), frequencies, attention_factor=1.0)

    near, far = (apply_rotary(q, *q_angles) * apply_rotary(k, *k_angles)).sum((1, 2))

    torch.testing.assert_close(near, far, atol=1e-4, rtol=1e-4)
