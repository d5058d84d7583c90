"""The fit of step times: it converges from a wrong prior, never falls, and survives what is not a step's fault."""

import numpy as np
import pytest

from rayserve_sarathi.scheduling.step_time import TILE, FittedStepTime, StepLoad, load_of, prior_times
from rayserve_sarathi.step_shape import StepShape
from tests.scheduling.true_times import ImaginedDevice, WrongModel

PRIORS = [WrongModel(0.5), WrongModel(1.0), WrongModel(2.0), None]


def random_shape(rng: np.random.Generator) -> StepShape:
    num_decodes = int(rng.integers(10, 60))
    is_mixed = rng.random() < 0.5
    chunk = (int(rng.choice([100, 300, 512, 700, 1500])), int(rng.integers(0, 6000)))
    return StepShape(
        num_decodes=num_decodes,
        decode_context_tokens=num_decodes * int(rng.integers(1000, 3000)),
        chunks=(chunk,) if is_mixed else (),
        num_samples=num_decodes,
    )


def fit(prior: WrongModel | None, num_steps: int, *, noise: float = 0.03) -> tuple[FittedStepTime, list[float]]:
    """Show a fit that many steps; return it, and what it predicted for each over what it then took."""
    device, fitted = ImaginedDevice(noise=noise), FittedStepTime(prior_times(prior))
    rng = np.random.default_rng(1)
    ratios = []
    for _ in range(num_steps):
        shape = random_shape(rng)
        (time_s,) = device(shape)
        ratios.append(fitted.predict_s(load_of(shape)) / time_s)
        fitted.observe(load_of(shape), time_s)
    return fitted, ratios


@pytest.mark.parametrize("prior", PRIORS)
def test_it_converges_in_some_tens_of_steps_from_any_prior(prior: WrongModel | None):
    _, ratios = fit(prior, 100)

    assert np.quantile(np.abs(np.log(ratios[20:])), 0.9) < 0.12  # tiles alone are worth a few percent


@pytest.mark.parametrize("prior", PRIORS)
def test_more_tokens_of_as_many_tiles_or_more_context_never_take_less(prior: WrongModel | None):
    fitted, _ = fit(prior, 40)

    for num_decodes in (0, 16, 200):
        for context_tokens, work in ((0, 0.0), (100_000, 1e6)):
            for tiles in range(2, 24):
                sizes = range((tiles - 1) * TILE + 1, tiles * TILE + 1, 7)
                times_s = [fitted.predict_s(StepLoad(size, num_decodes, context_tokens, work)) for size in sizes]
                assert times_s == sorted(times_s)
                assert times_s[0] > 0
    base = StepLoad(100, 50, 10_000, 1e5)
    for more in (base._replace(context_tokens=20_000), base._replace(chunk_work=1e6), base._replace(num_decodes=60)):
        assert fitted.predict_s(more) >= fitted.predict_s(base)


def test_a_device_that_slows_down_is_followed():
    fitted, _ = fit(WrongModel(1.0), 60)
    slow = ImaginedDevice(slowness=3.0)
    rng = np.random.default_rng(2)
    for _ in range(80):
        shape = random_shape(rng)
        fitted.observe(load_of(shape), slow(shape)[0])

    shape = random_shape(rng)
    assert fitted.predict_s(load_of(shape)) == pytest.approx(slow(shape)[0], rel=0.25)


def test_one_step_that_hangs_changes_little():
    fitted, _ = fit(WrongModel(1.0), 60)
    load = load_of(random_shape(np.random.default_rng(3)))
    before_s = fitted.predict_s(load)

    fitted.observe(load, 60.0)

    assert fitted.predict_s(load) == pytest.approx(before_s, rel=0.15)


def test_a_slow_first_step_is_no_scale():
    device, fitted = ImaginedDevice(), FittedStepTime(prior_times(None))
    shape = StepShape(num_decodes=20, decode_context_tokens=20_000, chunks=((500, 0),), num_samples=20)
    fitted.observe(load_of(shape), 30.0)  # compiles
    for _ in range(2):
        fitted.observe(load_of(shape), device(shape)[0])

    assert fitted.predict_s(load_of(shape)) == pytest.approx(device(shape)[0], rel=0.25)


def test_what_prompts_cost_is_remembered_through_a_thousand_decode_steps():
    fitted, _ = fit(WrongModel(2.0), 100)
    device = ImaginedDevice()
    decodes = StepShape(num_decodes=30, decode_context_tokens=60_000, chunks=(), num_samples=30)
    for _ in range(1000):
        fitted.observe(load_of(decodes), device(decodes)[0])

    mixed = StepShape(num_decodes=30, decode_context_tokens=60_000, chunks=((700, 1000),), num_samples=30)
    assert fitted.predict_s(load_of(mixed)) == pytest.approx(device(mixed)[0], rel=0.15)


def test_what_a_number_of_tiles_takes_beyond_the_sum_is_learnt():
    device, fitted = ImaginedDevice(), FittedStepTime(prior_times(None))
    rng = np.random.default_rng(1)
    for _ in range(200):
        tiles = int(rng.integers(3, 10))
        (time_s,) = device(shape_of_tiles(6 if tiles == 5 else tiles))
        fitted.observe(load_of(shape_of_tiles(tiles)), time_s)

    five_s, six_s = (fitted.predict_s(load_of(shape_of_tiles(tiles))) for tiles in (5, 6))
    assert five_s == pytest.approx(six_s, rel=0.03)


def shape_of_tiles(tiles: int) -> StepShape:
    return StepShape(num_decodes=0, decode_context_tokens=0, chunks=((tiles * TILE, 0),), num_samples=0)


def test_the_knee_is_where_tokens_take_as_long_as_the_rest():
    fitted, _ = fit(WrongModel(2.0), 100, noise=0.0)

    assert fitted.knee == pytest.approx(16e-3 / 6e-5, rel=0.2)
