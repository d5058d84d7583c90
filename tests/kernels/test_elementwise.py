"""The small kernels against their definitions in float64; rotary scalings are checked against transformers."""

import torch

from rayserve_sarathi.kernels.layer_norm import layer_norm
from rayserve_sarathi.kernels.rms_norm import add_rms_norm, rms_norm
from rayserve_sarathi.kernels.rotary import apply_rotary, inverse_frequencies, rotary_cos_sin
from rayserve_sarathi.kernels.silu_mul import silu_mul


def test_rms_norm() -> None:
    x, weight = torch.randn(3, 2, 8), torch.randn(8)
    expected = x.double() / (x.double().square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight

    torch.testing.assert_close(rms_norm(x, weight, eps=1e-3), expected.float())


def test_layer_norm() -> None:
    x, weight, bias = torch.randn(3, 2, 8), torch.randn(8), torch.randn(8)
    centred = x.double() - x.double().mean(-1, keepdim=True)
    expected = centred / (centred.square().mean(-1, keepdim=True) + 1e-3).sqrt() * weight + bias

    torch.testing.assert_close(layer_norm(x, weight, bias, eps=1e-3), expected.float())


def test_add_rms_norm_returns_norm_and_sum() -> None:
    x, residual, weight = torch.randn(3, 8), torch.randn(3, 8), torch.randn(8)

    normed, total = add_rms_norm(x, residual, weight, eps=1e-5)

    assert torch.equal(total, x + residual)
    assert torch.equal(normed, rms_norm(x + residual, weight, eps=1e-5))


def test_silu_mul() -> None:
    gate, up = torch.randn(3, 6), torch.randn(3, 6)

    torch.testing.assert_close(silu_mul(torch.cat((gate, up), dim=1)), gate / (1 + (-gate).exp()) * up)


def test_rotary_turns_each_pair_by_its_angle() -> None:
    x = torch.randn(2, 3, 8)
    frequencies = inverse_frequencies(8, theta=100.0)
    cos, sin = rotary_cos_sin(torch.tensor([0, 5]), frequencies, attention_factor=1.0)

    rotated = apply_rotary(x, cos, sin)

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
