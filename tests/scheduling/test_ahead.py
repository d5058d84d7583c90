"""Steps that are scheduled while the one before them runs, of tokens that are not known yet."""

import math
from typing import Any

import numpy as np
import pytest

from rayserve_sarathi.request import FinishReason
from rayserve_sarathi.scheduling.ahead import AHEAD_S
from rayserve_sarathi.step import StepFault, StepInput, StepOutput
from tests.factories import expected, make_request, make_scheduler
from tests.scheduling.driver import Driver
from tests.scheduling.test_token_budget import serve
from tests.scheduling.true_times import ImaginedDevice

PROMPT = [1, 2, 3, 4, 5]


def make_driver(*, step_s: float = AHEAD_S / 2, num_blocks: int = 64, **config: Any) -> Driver:
    """Make a driver whose first step, of a request that is gone, has come back: it knows how long steps take."""
    scheduler = make_scheduler(is_async=True, num_blocks=num_blocks, **config)
    driver = Driver(scheduler, num_blocks=num_blocks, block_size=4, step_s=step_s)
    driver.add(make_request("first", prompt=1, max_tokens=1))
    driver.submit()
    driver.land()
    return driver


def submit(driver: Driver) -> StepInput:
    step = driver.submit()
    assert step is not None
    return step


def pending_of(step: StepInput) -> dict[str, int]:
    """Which requests compute a token that is not known yet, and whose token of the step before it is."""
    if step.pending is None:
        return {}
    pairs = zip(step.pending.positions.tolist(), step.pending.samples.tolist(), strict=True)
    return {step.request_ids[position]: sample for position, sample in pairs}


def test_a_decode_is_scheduled_before_its_token_is_known():
    driver = make_driver()
    driver.add(make_request("a", prompt=PROMPT, max_tokens=4))
    driver.add(make_request("b", prompt=[7, 8], max_tokens=4))

    prefill, ahead = submit(driver), submit(driver)
    assert driver.submit() is None, "two steps are in flight"

    assert prefill.request_ids == ahead.request_ids == ("a", "b")
    assert ahead.context_lens.tolist() == [5, 2]
    assert pending_of(ahead) == {"a": 0, "b": 1}
    driver.run()
    assert (driver.tokens["a"], driver.tokens["b"]) == (expected(PROMPT, 4), expected([7, 8], 4))


def test_a_token_that_is_known_to_be_the_last_is_not_followed():
    driver = make_driver()
    driver.add(make_request("a", prompt=PROMPT, max_tokens=3))
    driver.add(make_request("prompt-only", prompt=[7, 8], max_tokens=0, prompt_logprobs=0))
    driver.run()

    assert sum(step.num_tokens for step in driver.steps[1:]) == len(PROMPT) + 2 + 2
    assert driver.tokens["a"] == expected(PROMPT, 3)


def test_who_stops_is_computed_once_more_in_vain():
    stop = expected(PROMPT, 2)[-1]
    driver = make_driver()
    driver.add(make_request("a", prompt=PROMPT, max_tokens=16, stop_token_ids=(stop,)))
    submit(driver), submit(driver)
    driver.land()
    submit(driver)
    driver.land()  # the second token, by which it ends

    assert driver.finished["a"] is FinishReason.STOP
    assert driver.scheduler.state().kv_cache_usage > 0, "its blocks are written to"
    assert driver.submit() is None
    driver.land()
    assert driver.tokens["a"] == expected(PROMPT, 2)
    assert driver.scheduler.state().kv_cache_usage == 0


def test_an_aborted_request_keeps_its_blocks_until_both_steps_are_back():
    driver = make_driver()
    driver.add(make_request("a", prompt=PROMPT, max_tokens=16))
    submit(driver), submit(driver)
    driver.scheduler.abort("a")
    usage = [driver.scheduler.state().kv_cache_usage]
    for _ in range(2):
        driver.land()
        usage.append(driver.scheduler.state().kv_cache_usage)

    assert usage[0] == usage[1] > usage[2] == 0
    assert driver.tokens["a"] == []


def test_the_step_after_a_long_one_is_made_up_shortly_before_that_ends_and_takes_who_came_meanwhile():
    driver = make_driver(step_s=5 * AHEAD_S)
    driver.add(make_request("a", prompt=PROMPT, max_tokens=4))
    submit(driver)
    assert driver.submit() is None
    assert driver.scheduler.ahead_due_s == pytest.approx(driver.now_s + 4 * AHEAD_S)
    driver.add(make_request("b", prompt=[7, 8], max_tokens=4))
    driver.now_s = driver.scheduler.ahead_due_s

    assert pending_of(submit(driver)) == {"a": 0}
    assert driver.steps[-1].request_ids == ("a", "b")
    assert driver.scheduler.ahead_due_s == math.inf, "two steps are in flight"


@pytest.mark.parametrize("is_async", [False, True], ids=["not-asked-for", "before-the-first-has-come-back"])
def test_no_step_is_made_up_ahead(is_async: bool):
    scheduler = make_scheduler(is_async=is_async)
    scheduler.add(make_request("a", prompt=PROMPT, max_tokens=4))
    scheduler.schedule(0.0)

    assert scheduler.ahead_due_s == math.inf
    assert scheduler.schedule(1e9) is None


def test_the_oldest_gets_the_next_block_though_newer_ones_could_go_on():
    driver = make_driver(num_blocks=5, watermark=0.0, enable_prefix_caching=False)
    driver.add(make_request("old", prompt=7, max_tokens=8))  # two blocks for eight tokens, four for fifteen
    driver.add(make_request("new", prompt=9, max_tokens=8))  # three for twelve
    prefill, ahead = submit(driver), submit(driver)
    assert set(prefill.request_ids) == set(ahead.request_ids) == {"old", "new"}
    driver.land()
    # The ninth token of `old` has no block, and nobody who could give one is idle: `new` does not go on alone.
    assert driver.submit() is None
    driver.land()

    assert submit(driver).request_ids == ("old",)
    assert driver.scheduler.metrics.num_preemptions == 1
    driver.run()
    assert {name: len(tokens) for name, tokens in driver.tokens.items()} == {"first": 1, "old": 8, "new": 8}


def test_a_step_that_fails_ends_its_requests_and_spares_those_that_join_the_next():
    scheduler = make_driver().scheduler
    scheduler.add(make_request("a", prompt=PROMPT, max_tokens=16))
    first = scheduler.schedule(1.0)
    assert first is not None
    scheduler.add(make_request("b", prompt=[7, 8], max_tokens=16))
    second = scheduler.schedule(1.0)
    assert second is not None and second.request_ids == ("a", "b")
    fault = StepFault(message="no", stage=0)
    (output,) = scheduler.update(output_of(first, fault=fault), 1.01)
    assert (output.request_id, output.finish_reason) == ("a", FinishReason.ERROR)
    scheduler.check_integrity()

    (output,) = scheduler.update(output_of(second), 1.02)
    assert (output.request_id, output.token_ids) == ("b", (9,))
    scheduler.check_integrity()
    assert list(scheduler.request_ids()) == ["b"]


def output_of(step: StepInput, *, fault: StepFault | None = None) -> StepOutput:
    num_samples = 0 if fault else len(step.sample_requests)
    token_ids = np.full(num_samples, 9, dtype=np.int32)
    return StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=token_ids, fault=fault)


def test_min_tokens_and_prompt_logprobs_count_the_token_that_is_on_its_way():
    driver = make_driver()
    driver.add(make_request("a", prompt=PROMPT, max_tokens=8, min_tokens=2, stop_token_ids=(3,), prompt_logprobs=0))
    steps = [submit(driver), submit(driver)]
    driver.land()
    steps.append(submit(driver))

    assert [step.logit_bias is not None for step in steps] == [True, True, False]
    assert [len(step.prompt_logprobs) for step in steps] == [1, 0, 0]


@pytest.mark.parametrize("tbt_s", [0.01, 0.02])
def test_a_budget_of_auto_keeps_its_target_and_its_speed(tbt_s: float):
    device = ImaginedDevice(noise=0.03, slowness=0.2)
    runs = {}
    for is_async in (False, True):
        requests = [
            make_request(str(index), prompt=[1] * 3000, max_tokens=200, arrival_s=0.05 * index) for index in range(40)
        ]
        runs[is_async] = serve("auto", requests, tbt_s=tbt_s, device=device, is_async=is_async)

    assert all(run.gap_quantile_s(0.99) <= tbt_s for run in runs.values())
    # Not in smaller steps either: a token that is on its way has its deadline when it will be there.
    assert len(runs[True].num_tokens) <= 1.05 * len(runs[False].num_tokens)
    assert runs[True].end_s <= 1.05 * runs[False].end_s
