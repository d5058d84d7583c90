"""`token_budget: auto`: every gap within the target, nobody starves, and as fast as the best fixed budget."""

import logging
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from rayserve_sarathi.config import SloConfig
from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.token_budget import TILE
from rayserve_sarathi.step_shape import StepShape
from tests.factories import make_request, make_scheduler
from tests.scheduling.true_times import ImaginedDevice, WrongModel
from tests.scheduling.virtual_run import TrueTimes, VirtualRun, run_virtually


def chat_requests(num_requests: int, *, rate: float) -> list[Request]:
    """Return requests of the lengths of a chat, in order of arrival."""
    rng = np.random.default_rng(1)
    arrivals_s = np.cumsum(rng.exponential(1 / rate, num_requests))
    prompts = np.clip(rng.lognormal(np.log(1730), 0.9, num_requests), 16, 7000).astype(int)
    outputs = np.clip(rng.lognormal(np.log(200), 0.6, num_requests), 4, 800).astype(int)
    return [
        make_request(f"request-{index}", prompt=[1] * int(prompt), max_tokens=int(output), arrival_s=float(arrival_s))
        for index, (arrival_s, prompt, output) in enumerate(zip(arrivals_s, prompts, outputs, strict=True))
    ]


def serve(
    token_budget: int | str,
    requests: Iterable[Request],
    *,
    tbt_s: float | None = 0.1,
    num_stages: int = 1,
    device: TrueTimes | None = None,
    **options: Any,
) -> VirtualRun:
    scheduler = make_scheduler(
        num_blocks=20_000,
        block_size=16,
        max_model_len=130_000,
        enable_prefix_caching=False,
        token_budget=token_budget,
        slo=SloConfig(tbt_s=tbt_s),
        max_num_seqs=options.pop("max_num_seqs", 64),
        max_num_waiting=10_000,
        max_steps_in_flight=1 if num_stages == 1 else num_stages + 1,
        num_decode_groups=num_stages,
        **options,
    )
    return run_virtually(scheduler, list(requests), device or ImaginedDevice(num_stages=num_stages, noise=0.03))


@pytest.mark.parametrize("prior", [WrongModel(0.5), WrongModel(2.0), None])
@pytest.mark.parametrize("tbt_s", [0.04, 0.1])
def test_the_target_is_kept_whatever_is_believed_at_first(tbt_s: float, prior: WrongModel | None):
    run = serve("auto", chat_requests(150, rate=100), tbt_s=tbt_s, prior=prior)

    assert run.gap_quantile_s(0.99) <= tbt_s


@pytest.mark.parametrize("num_stages", [2, 3])
def test_the_target_is_kept_in_a_pipeline(num_stages: int):
    run = serve("auto", chat_requests(150, rate=100), tbt_s=0.1 * num_stages, num_stages=num_stages)

    assert run.gap_quantile_s(0.99) <= 0.1 * num_stages


@pytest.mark.parametrize(("num_stages", "tbt_s", "slack"), [(1, 0.05, 1.03), (1, 0.1, 1.03), (2, 0.2, 1.05)])
def test_it_is_as_fast_as_the_best_fixed_budget(num_stages: int, tbt_s: float, slack: float):
    auto = serve("auto", chat_requests(150, rate=100), tbt_s=tbt_s, num_stages=num_stages, prior=WrongModel(2.0))

    fixed = [
        serve(budget, chat_requests(150, rate=100), tbt_s=None, num_stages=num_stages)
        for budget in (256, 384, 512, 768, 1024, 1536)
    ]
    best_s = min(run.end_s for run in fixed if run.gap_quantile_s(0.99) <= tbt_s)
    assert auto.end_s <= slack * best_s


def test_the_budget_is_larger_when_nothing_decodes():
    run = serve("auto", [make_request("a", prompt=[1] * 8000, max_tokens=8)], tbt_s=0.05)

    assert run.num_tokens[0] > 1500  # with decodes, some 600 take 50 ms
    assert len(run.num_tokens) < 4 + 8


def test_steps_are_whole_tiles_where_there_is_room():
    run = serve("auto", chat_requests(40, rate=100))

    full = [num_tokens for num_tokens in run.num_tokens if num_tokens > 2 * TILE]
    assert sum(num_tokens % TILE == 0 for num_tokens in full) > 0.8 * len(full)


def test_a_loose_target_makes_no_steps_larger_than_it_takes():
    loose = serve("auto", chat_requests(100, rate=100), tbt_s=1.0)

    fastest_s = min(serve(budget, chat_requests(100, rate=100), tbt_s=None).end_s for budget in (512, 1024, 2048))
    assert loose.end_s < 1.05 * fastest_s
    assert loose.gap_quantile_s(0.99) < 0.1


class TokensAlone(WrongModel):
    """A device on which nothing is saved by large steps."""

    def stage_times_s(self, shape: StepShape) -> Sequence[float]:
        """See `StepTimeModel`."""
        return [1e-4 * shape.num_tokens]

    def cpu_s(self, shape: StepShape) -> float:
        """See `StepTimeModel`."""
        return 0.0


def test_many_decodes_leave_prompts_half_a_tile():
    decoding = [make_request(str(index), prompt=[1], max_tokens=300) for index in range(TILE - 1)]
    late = make_request("late", prompt=[1] * 10_000, max_tokens=2, arrival_s=1.0)
    model = TokensAlone(1.0)

    run = serve("auto", [*decoding, late], max_num_seqs=TILE, device=model.stage_times_s, prior=model)

    assert run.first_tokens_s["late"] < run.end_s - 1.0  # by when the others have ended


class SmallKnee(WrongModel):
    """A pipeline of two stages whose steps cost little beside their tokens, but enough that a tile wastes a fifth."""

    num_stages = 2

    def stage_times_s(self, shape: StepShape) -> Sequence[float]:
        """See `StepTimeModel`."""
        return [4e-3 + 1.2e-4 * shape.num_tokens] * 2


def test_a_pipelines_steps_are_even_but_not_so_short_that_they_waste_the_device():
    # The prior's knee is at 34 tokens, and decodes make the steps between short: no reason to stay with one tile.
    model = SmallKnee(1.0)
    pipeline = {"tbt_s": 1.0, "num_stages": 2, "device": model.stage_times_s}
    auto = serve("auto", chat_requests(100, rate=4), prior=model, **pipeline)

    fixed = [serve(budget, chat_requests(100, rate=4), **pipeline) for budget in (128, 256, 384, 512, 768)]
    assert auto.end_s <= 1.03 * min(run.end_s for run in fixed)
    assert auto.end_s < 0.95 * fixed[0].end_s


def test_numbers_of_tiles_that_take_as_long_as_more_are_left_out():
    device = ImaginedDevice(noise=0.01)

    def in_waves(shape: StepShape) -> list[float]:
        # Two tiles at once.
        return device(replace(shape, chunks=((-(-shape.num_tokens // 256) * 256 - shape.num_decodes, 0),)))

    run = serve("auto", chat_requests(100, rate=100), tbt_s=0.06, device=in_waves)

    full = [-(-num_tokens // TILE) for num_tokens in run.num_tokens[100:] if num_tokens > TILE]
    assert sum(tiles % 2 == 0 for tiles in full) > 0.8 * len(full)


def test_without_a_target_the_budget_is_the_knee():
    run = serve("auto", chat_requests(60, rate=100), tbt_s=None, prior=WrongModel(2.0))

    busy = [num_tokens for num_tokens in run.num_tokens[20:] if num_tokens > 100]
    assert np.median(busy) in (2 * TILE, 3 * TILE)  # 16 ms / 60 us = 267 tokens


def test_a_target_that_decodes_alone_exceed_starves_nobody(caplog):
    with caplog.at_level(logging.WARNING):
        run = serve("auto", chat_requests(12, rate=100), tbt_s=0.01, max_num_seqs=8)

    assert len(run.first_tokens_s) == 12
    (record,) = [record for record in caplog.records if "slo.tbt_s" in record.message]
    assert "slo.tbt_s=0.01 cannot be kept" in record.message


def test_a_very_long_prompt_does_not_hold_up_a_short_one():
    decoding = make_request("decoding", prompt=[1] * 100, max_tokens=3000)
    long = make_request("long", prompt=[1] * 100_000, max_tokens=2, arrival_s=0.1)
    short = make_request("short", prompt=[1] * 300, max_tokens=2, arrival_s=0.2)

    run = serve("auto", [decoding, long, short], tbt_s=0.05)

    assert run.first_tokens_s["short"] < 1.0 < 10.0 < run.first_tokens_s["long"]


def test_a_decode_that_is_late_anyway_does_not_hold_up_prompts():
    # Its gap is lost while the pipeline was away; the next one is not.
    scheduler = make_scheduler(
        num_blocks=2000, block_size=16, token_budget="auto", slo=SloConfig(tbt_s=0.1), prior=WrongModel(1.0)
    )
    run_virtually(scheduler, [make_request("a", prompt=[1] * 100, max_tokens=50)], ImaginedDevice())
    scheduler.add(make_request("b", prompt=[1] * 100, max_tokens=50))
    run_until_first = scheduler.schedule(10.0)
    assert run_until_first is not None
    scheduler.update(_output(run_until_first), 10.02)
    scheduler.add(make_request("c", prompt=[1] * 3000, max_tokens=50))

    step = scheduler.schedule(11.0)

    assert step is not None
    assert step.num_scheduled_tokens["c"] > 500


def _output(step: Any) -> Any:
    from rayserve_sarathi.step import StepOutput

    token_ids = np.zeros(len(step.sample_requests), dtype=np.int32)
    return StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=token_ids)
