"""How requests begin and end, whatever is in a step: cached prefixes, limits, aborts, stop tokens, failures."""

import numpy as np
import pytest

from rayserve_sarathi.errors import ContextLengthError, InvalidRequestError, OverloadedError
from rayserve_sarathi.request import FinishReason, Request
from rayserve_sarathi.step import StepFault, StepOutput
from tests.factories import VOCAB_SIZE, expected, make_request, make_scheduler
from tests.scheduling.driver import make_driver, tokens_of

BROKEN = StepFault(message="broken", stage=0)


def test_a_cached_prefix_is_not_computed_again():
    driver = make_driver(token_budget=64)
    driver.add(make_request("first", prompt=range(20)))
    driver.run()
    driver.add(make_request("second", prompt=range(20)))

    assert tokens_of(driver.submit()) == {"second": 4}
    driver.run()
    assert driver.tokens["second"] == driver.tokens["first"]


def test_a_block_is_shared_only_once_its_kv_exists():
    driver = make_driver(token_budget=64, max_steps_in_flight=2)
    driver.add(make_request("first", prompt=range(20)))
    driver.submit()
    driver.add(make_request("second", prompt=range(20)))

    assert tokens_of(driver.submit()) == {"second": 20}


def test_requests_of_different_salts_share_nothing():
    driver = make_driver(token_budget=64)
    driver.add(make_request("first", prompt=range(20), cache_salt="tenant-a"))
    driver.run()
    driver.add(make_request("second", prompt=range(20), cache_salt="tenant-b"))

    assert tokens_of(driver.submit()) == {"second": 20}


def test_prompt_logprobs_compute_the_whole_prompt_in_spite_of_the_cache():
    driver = make_driver(token_budget=64)
    driver.add(make_request("first", prompt=range(20)))
    driver.run()
    driver.add(make_request("second", prompt=range(20), prompt_logprobs=1))

    step = driver.submit()
    assert step is not None
    assert tokens_of(step) == {"second": 20}
    assert step.prompt_logprobs[0].target_token_ids.tolist() == list(range(1, 20))


@pytest.mark.parametrize("phase", ["waiting", "in-flight", "between-chunks", "decoding", "preempted"])
def test_an_abort_frees_the_blocks_in_any_phase(phase: str):
    driver = make_driver(num_blocks=8, block_size=2, token_budget=5, watermark=0.0)
    driver.add(make_request("old", prompt=7, max_tokens=9))
    driver.add(make_request("victim", prompt=7, max_tokens=9))
    num_steps = {"waiting": 0, "in-flight": 2, "between-chunks": 2, "decoding": 3, "preempted": 6}[phase]
    for _ in range(num_steps):
        driver.submit()
        driver.land()
    if phase == "in-flight":
        driver.submit()

    assert driver.scheduler.abort("victim")
    assert not driver.scheduler.abort("victim")
    assert driver.scheduler.abort("old")
    driver.scheduler.check_integrity()
    if phase == "in-flight":
        driver.land()
    assert driver.scheduler.state().kv_cache_usage == 0
    assert not driver.scheduler.has_unfinished_requests


def test_end_of_sequence_and_stop_tokens_end_a_request():
    prompt = [1, 2, 3]
    second = expected(prompt, 2)[1]
    driver = make_driver()
    driver.add(make_request("eos", prompt=prompt, eos_token_ids=(second,)))
    driver.add(make_request("stop", prompt=prompt, stop_token_ids=(second,)))
    driver.add(make_request("ignore", prompt=prompt, eos_token_ids=(second,), ignore_eos=True))
    driver.run()

    assert driver.finished == {"eos": FinishReason.STOP, "stop": FinishReason.STOP, "ignore": FinishReason.LENGTH}
    assert driver.tokens["eos"] == driver.tokens["stop"] == expected(prompt, 2)
    assert len(driver.tokens["ignore"]) == 16


def test_min_tokens_bans_the_tokens_that_would_end_the_request():
    driver = make_driver()
    driver.add(make_request("a", min_tokens=1, max_tokens=4, eos_token_ids=(5,), stop_token_ids=(7,)))
    first = driver.submit()
    driver.land()
    second = driver.submit()

    assert first is not None and first.logit_bias is not None
    assert sorted(first.logit_bias.token_ids.tolist()) == [5, 7]
    assert second is not None and second.logit_bias is None


def test_a_prompt_alone_is_computed_and_no_token_returned():
    driver = make_driver()
    driver.add(make_request("score", max_tokens=0))
    driver.run()

    assert driver.tokens["score"] == []
    assert driver.finished == {"score": FinishReason.LENGTH}


def test_a_resubmitted_request_continues_after_the_tokens_it_had():
    driver = make_driver(token_budget=4)
    prompt = [3, 1, 4, 1, 5]
    all_tokens = expected(prompt, 10)
    driver.add(make_request("again", prompt=prompt, output_token_ids=all_tokens[:6], max_tokens=10))
    driver.run()

    assert driver.tokens["again"] == all_tokens


def test_a_request_longer_than_the_context_is_refused():
    scheduler = make_scheduler(max_model_len=20)
    with pytest.raises(ContextLengthError, match="maximum context length is 20 tokens"):
        scheduler.add(make_request("a", prompt=10, max_tokens=11))


def test_an_empty_prompt_is_refused():
    with pytest.raises(InvalidRequestError, match="empty"):
        make_request("a", prompt=[])


def test_a_full_queue_refuses_with_a_time_to_come_back():
    scheduler = make_scheduler(max_num_waiting=2)
    for name in "ab":
        scheduler.add(make_request(name))
    with pytest.raises(OverloadedError, match="2 requests are waiting") as caught:
        scheduler.add(make_request("c"))
    assert caught.value.retry_after_s >= 1


def test_more_sequences_than_the_queue_can_ever_hold_are_refused_for_good():
    with pytest.raises(InvalidRequestError, match=r"3 sequences .* more than the queue of 2 holds"):
        make_scheduler(max_num_waiting=2).check_capacity(3, 0.0)


def test_a_failed_step_ends_its_requests_and_no_other():
    driver = make_driver(token_budget=8)
    driver.add(make_request("bad", prompt=8))
    driver.add(make_request("good", prompt=8))
    step = driver.submit()
    assert step is not None and step.request_ids == ("bad",)
    output = StepOutput(step_id=0, epoch=0, token_ids=step.token_ids[:0], fault=BROKEN)

    outputs = driver.scheduler.update(output, 1.0)

    assert [(output.request_id, output.finish_reason, output.error) for output in outputs] == [
        ("bad", FinishReason.ERROR, "broken")
    ]
    assert list(driver.scheduler.request_ids()) == ["good"]
    driver.scheduler.check_integrity()


@pytest.mark.parametrize("token_ids", [[VOCAB_SIZE], [-1], [1, 2], []])
def test_an_impossible_result_of_a_stage_fails_the_step(token_ids: list[int]):
    driver = make_driver()
    driver.add(make_request("a"))
    driver.submit()
    output = StepOutput(step_id=0, epoch=0, token_ids=np.array(token_ids, dtype=np.int32))

    (result,) = driver.scheduler.update(output, 1.0)
    assert result.finish_reason is FinishReason.ERROR
    assert driver.scheduler.state().kv_cache_usage == 0


def test_started_requests_are_finished_running_or_waiting():
    driver = make_driver(num_blocks=16, token_budget=6)
    for index in range(12):
        driver.add(make_request(f"request-{index}", prompt=9, max_tokens=5))
    for _ in range(6):
        driver.submit()
        driver.land()
    driver.scheduler.abort("request-11")
    metrics, state = driver.scheduler.metrics, driver.scheduler.state()

    assert metrics.num_started == 12
    assert sum(metrics.num_finished.values()) + state.num_requests_running + state.num_requests_waiting == 12
    driver.run()
    assert metrics.time_to_first_token_s.count == 11
    assert metrics.num_generation_tokens == 11 * 5


def test_a_request_is_hashable_by_identity():
    first, second = make_request("same"), make_request("same")
    assert len({first: 1, second: 2}) == 2
    assert isinstance(first, Request)
