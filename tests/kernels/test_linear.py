"""Matrix products in the layout of the C++ kernel, or in torch's."""

import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from rayserve_sarathi.kernels.linear import Linear


@pytest.mark.parametrize("num_rows", [1, 2, 3, 6, 7, 12, 13, 70])
@pytest.mark.parametrize(("num_outputs", "num_inputs"), [(512, 300), (64, 64), (97, 5), (1, 1), (48, 1025), (70, 2100)])
@pytest.mark.parametrize("has_bias", [False, True])
def test_it_is_a_matrix_product(num_rows: int, num_outputs: int, num_inputs: int, has_bias: bool) -> None:
    torch.manual_seed(0)
    weight, x = torch.randn(num_outputs, num_inputs), torch.randn(num_rows, num_inputs)
    bias = torch.randn(num_outputs) if has_bias else None
    expected = F.linear(x.double(), weight.double(), None if bias is None else bias.double()).float()

    torch.testing.assert_close(Linear(weight, bias)(x), expected, atol=1e-4, rtol=1e-4)


def test_rows_may_be_part_of_wider_ones() -> None:
    weight, wide = torch.randn(32, 20), torch.randn(5, 30)

    torch.testing.assert_close(Linear(weight)(wide[:, 10:]), F.linear(wide[:, 10:], weight))


def test_what_is_not_finite_stays_in_its_row() -> None:
    weight, x = torch.randn(64, 16), torch.randn(14, 16)
    x[3, 2] = torch.nan
    x[7, 1] = torch.inf

    y = Linear(weight)(x)

    assert y[3].isnan().all()
    assert not y[7].isfinite().any()
    assert y[[row for row in range(14) if row not in (3, 7)]].isfinite().all()


def test_another_type_is_left_to_torch() -> None:
    weight, x = torch.randn(6, 5).bfloat16(), torch.randn(2, 5).bfloat16()

    assert torch.equal(Linear(weight)(x), F.linear(x, weight))
