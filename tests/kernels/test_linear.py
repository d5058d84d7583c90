import pytest
import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

from rayserve_sarathi.kernels.linear import Linear, can_pack


@pytest.mark.parametrize("num_rows", [1, 3, 16, 70])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_packed_weight_gives_what_an_unpacked_one_gives(num_rows: int, has_bias: bool) -> None:
    weight, x = torch.randn(512, 300), torch.randn(num_rows, 300)
    bias = torch.randn(512) if has_bias else None

    torch.testing.assert_close(Linear(weight, bias)(x), F.linear(x, weight, bias), atol=1e-4, rtol=1e-4)


@pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this build of torch has no oneDNN")
def test_only_large_float32_weights_are_packed() -> None:
    assert can_pack(torch.empty(512, 300))
    assert not can_pack(torch.empty(64, 64))
    assert not can_pack(torch.empty(512, 300, dtype=torch.bfloat16))


def test_a_weight_that_cannot_be_packed_works_too() -> None:
    weight, x = torch.randn(6, 5).bfloat16(), torch.randn(2, 5).bfloat16()

    assert torch.equal(Linear(weight)(x), F.linear(x, weight))
