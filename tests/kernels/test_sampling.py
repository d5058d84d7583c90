"""The samplers in Triton, in its interpreter (see conftest.py), and in C++ beside the plain one."""

from collections.abc import Callable

import numpy as np
import pytest
import torch

from rayserve_sarathi.execution.sampler import draw as plain_draw
from rayserve_sarathi.kernels import cpu_sampling
from rayserve_sarathi.kernels.native import kernels_for

SETTINGS = {
    "greedy": {"temperature": 0.0},
    "all": {},
    "cold": {"temperature": 0.2},
    "tiny temperature": {"temperature": 1e-30},
    "top_k": {"top_k": 7},
    "top_k of one": {"top_k": 1},
    "top_k of more than there are": {"top_k": 10_000},
    "top_p": {"top_p": 0.6},
    "tiny top_p": {"top_p": 1e-6},
    "min_p": {"min_p": 0.3},
    "all three": {"temperature": 1.7, "top_k": 30, "top_p": 0.9, "min_p": 0.02},
}


def table(settings: dict[str, float], u: np.ndarray) -> np.ndarray:
    """Return what samplers are told, [5, n], of rows with the same settings."""
    row = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0} | settings
    # What a request says arrives in float32.
    return np.stack([*(np.full(len(u), np.float32(value)) for value in row.values()), u]).astype(np.float64)


@pytest.fixture(params=["triton", "cpp"])
def draw(request: pytest.FixtureRequest) -> Callable[..., torch.Tensor]:
    if request.param == "cpp":
        if kernels_for(torch.empty(0)) is None:
            pytest.skip("there is no build of the C++ kernels")
        return cpu_sampling.draw
    module = pytest.importorskip("rayserve_sarathi.kernels.sampling", reason="there is no Triton")
    drawing: Callable[..., torch.Tensor] = module.draw
    return drawing


@pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
@pytest.mark.parametrize("vocab_size", [50, 5000])
def test_it_draws_the_same_tokens(
    draw: Callable[..., torch.Tensor], settings: dict[str, float], vocab_size: int
) -> None:
    num_rows = 12
    logits = 3 * torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(3))
    logits[:, 11] = logits[:, 4]  # equals are kept or dropped together
    u = np.random.default_rng(5).random(num_rows)
    u[:2] = 0, 1 - 2.0**-52

    drawn = draw(logits.clone(), table(settings, u))

    assert drawn.tolist() == plain_draw(logits.clone(), table(settings, u)).tolist()


def test_rows_have_settings_of_their_own(draw: Callable[..., torch.Tensor]) -> None:
    logits = torch.randn(len(SETTINGS), 60, generator=torch.Generator().manual_seed(3))
    u = np.random.default_rng(6).random(len(SETTINGS))
    together = np.concatenate([table(settings, u[[row]]) for row, settings in enumerate(SETTINGS.values())], axis=1)

    drawn = draw(logits.clone(), together)

    assert drawn.tolist() == plain_draw(logits.clone(), together).tolist()


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_row_that_is_not_finite_spoils_no_other(draw: Callable[..., torch.Tensor]) -> None:
    logits = torch.randn(3, 60)
    logits[1] = torch.nan
    u = np.array([0.3, 0.3, 0.9])
    settings = table({"top_p": 0.9, "top_k": 5}, u)

    drawn = draw(logits.clone(), settings)

    logits[1] = 0
    expected = plain_draw(logits, settings)
    assert drawn[[0, 2]].tolist() == expected[[0, 2]].tolist()


def test_tokens_without_weight_are_never_drawn(draw: Callable[..., torch.Tensor]) -> None:
    logits = torch.full((64, 301), -torch.inf)
    logits[:, [7, 299]] = 0.0
    u = np.linspace(0, 1 - 2.0**-52, 64)

    drawn = draw(logits, table({}, u))

    assert drawn.tolist() == [7] * 32 + [299] * 32
