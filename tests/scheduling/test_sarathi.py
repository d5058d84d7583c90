"""What stall-free batching promises."""

import numpy as np
import pytest

from rayserve_sarathi.errors import InvalidRequestError, OverloadedError
from rayserve_sarathi.request import FinishReason, TokenLogprobs
from rayserve_sarathi.step import StepFault, StepOutput
from tests.factories import VOCAB_SIZE, expected, make_request, make_scheduler
from tests.scheduling.driver import make_driver, tokens_of

BROKEN = StepFault(message="broken", stage=0)


def test_a_decode_never_waits_for_a_prefill():
    driver = make_driver(token_budget=8)
    driver.add(make_request("decoding", prompt=5))
    driver.submit()
    driver.land()
    driver.add(make_request("long-prompt", prompt=100))

    assert tokens_of(driver.submit()) == {"decoding": 1, "long-prompt": 7}


def test_the_last_chunk_of_a_prompt_shares_its_step_with_the_next_prompt():
    driver = make_driver(token_budget=8)
    driver.add(make_request("a", prompt=10))
    driver.add(make_request("b", prompt=10))

    assert tokens_of(driver.submit()) == {"a": 8}
    driver.land()
    assert tokens_of(driver.submit()) == {"a": 2, "b": 6}
    driver.land()
    assert tokens_of(driver.submit()) == {"a": 1, "b": 4}


def test_more_decodes_than_budget_all_run_and_no_prompt_chunk_goes_negative():
    driver = make_driver(token_budget=2)
    for name in "abcd":
        driver.add(make_request(name, prompt=1, max_tokens=20))
    for _ in range(6):
        driver.submit()
        driver.land()
    driver.add(make_request("late", prompt=9))

    assert tokens_of(driver.submit()) == {"a": 1, "b": 1}
    driver.run()
    assert set(driver.finished) == {"a", "b", "c", "d", "late"}


def test_decodes_beyond_the_budget_are_never_dropped():
    driver = make_driver(token_budget=4)
    for name in "abcd":
        driver.add(make_request(name, prompt=1, max_tokens=20))
    driver.submit()
    driver.land()
    assert tokens_of(driver.submit()) == dict.fromkeys("abcd", 1)


def test_budget_of_one_computes_one_token_a_step_and_finishes():
    driver = make_driver(token_budget=1, block_size=1, num_blocks=32)
    driver.add(make_request("a", prompt=5, max_tokens=4))
    driver.add(make_request("b", prompt=3, max_tokens=4))
    driver.run()

    assert all(step.num_tokens == 1 for step in driver.steps)
    assert driver.finished == {"a": FinishReason.LENGTH, "b": FinishReason.LENGTH}


def test_two_half_prefilled_prompts_share_the_budget_and_a_third_waits():
    driver = make_driver(token_budget=8, max_num_partial_prefills=2)
    for name in ("long", "longer", "third"):
        driver.add(make_request(name, prompt=40))

    assert tokens_of(driver.submit()) == {"long": 4, "longer": 4}


def test_a_short_prompt_does_not_wait_for_a_long_one_where_two_may_be_half_prefilled():
    driver = make_driver(token_budget=8, max_num_partial_prefills=2)
    driver.add(make_request("long", prompt=40))
    driver.submit()
    driver.land()
    driver.add(make_request("short", prompt=3))

    assert tokens_of(driver.submit()) == {"long": 5, "short": 3}


def test_successive_chunks_of_a_prompt_follow_each_other_through_the_stages():
    driver = make_driver(token_budget=8, max_steps_in_flight=3)
    driver.add(make_request("a", prompt=20))

    assert [tokens_of(driver.submit()) for _ in range(4)] == [{"a": 8}, {"a": 8}, {"a": 4}, {}]


def test_a_decode_is_in_at_most_one_step_in_flight():
    driver = make_driver(token_budget=8, max_steps_in_flight=3)
    driver.add(make_request("a", prompt=4))
    driver.submit()
    assert driver.submit() is None
    driver.land()
    assert tokens_of(driver.submit()) == {"a": 1}
    assert driver.submit() is None


def test_the_newest_request_is_preempted_when_blocks_run_out():
    driver = make_driver(num_blocks=8, block_size=2, token_budget=16, watermark=0.0)
    driver.add(make_request("old", prompt=7, max_tokens=9))
    driver.add(make_request("new", prompt=7, max_tokens=9))
    driver.submit()
    driver.land()  # 4 + 4 blocks hold 8 + 8 tokens
    driver.submit()
    driver.land()

    assert tokens_of(driver.submit()) == {"old": 1}
    assert driver.scheduler.metrics.num_preemptions == 1
    driver.run()
    assert len(driver.tokens["new"]) == 9


def test_a_request_in_flight_is_never_preempted():
    driver = make_driver(
        num_blocks=8, block_size=2, token_budget=8, watermark=0.0, max_steps_in_flight=2, num_decode_groups=2
    )
    driver.add(make_request("old", prompt=7, max_tokens=9))
    driver.add(make_request("new", prompt=7, max_tokens=9))
    assert tokens_of(driver.submit()) == {"old": 7, "new": 1}
    assert tokens_of(driver.submit()) == {"new": 6}
    driver.land()
    assert tokens_of(driver.submit()) == {"old": 1}  # its 8th token, the last that its 4 blocks hold
    driver.land()
    assert tokens_of(driver.submit()) == {"new": 1}
    driver.land()
    assert driver.submit() is None  # old needs a block, and new is in flight
    driver.land()

    assert driver.scheduler.metrics.num_preemptions == 0
    assert tokens_of(driver.submit()) == {"old": 1}
    assert driver.scheduler.metrics.num_preemptions == 1
    driver.run()
    assert set(driver.finished) == {"old", "new"}


def test_the_oldest_request_waits_for_blocks_that_an_aborted_one_holds_in_flight():
    driver = make_driver(num_blocks=12, block_size=1, token_budget=4, watermark=0.0, max_steps_in_flight=4)
    driver.add(make_request("old", prompt=2, max_tokens=8))
    driver.submit()
    driver.land()
    driver.add(make_request("young", prompt=9, max_tokens=1))
    driver.submit()
    driver.submit()
    driver.scheduler.abort("young")
    driver.run()

    assert driver.scheduler.metrics.num_preemptions == 0
    assert len(driver.tokens["old"]) == 8


def test_the_blocks_of_an_aborted_request_stay_taken_until_its_step_returns():
    driver = make_driver(num_blocks=8, block_size=2, token_budget=8)
    driver.add(make_request("aborted", prompt=8, max_tokens=4))
    driver.submit()
    usage = driver.scheduler.state().kv_cache_usage
    driver.scheduler.abort("aborted")

    assert driver.scheduler.state().kv_cache_usage == usage > 0
    driver.land()
    assert driver.scheduler.state().kv_cache_usage == 0


def test_what_an_aborted_or_failed_step_computed_is_not_shared():
    driver = make_driver(token_budget=64, max_steps_in_flight=2)
    driver.add(make_request("aborted", prompt=range(20)))
    driver.submit()
    driver.scheduler.abort("aborted")
    driver.land()
    driver.add(make_request("failed", prompt=range(20)))
    step = driver.submit()
    assert step is not None
    assert tokens_of(step) == {"failed": 20}
    driver.scheduler.update(StepOutput(step_id=1, epoch=0, token_ids=step.token_ids[:0], fault=BROKEN), 1.0)
    driver.scheduler.add(make_request("next", prompt=range(20)))

    assert tokens_of(driver.scheduler.schedule(2.0)) == {"next": 20}


def test_a_failed_chunk_ends_a_request_whose_later_chunks_are_in_flight():
    driver = make_driver(token_budget=8, max_steps_in_flight=3)
    driver.add(make_request("a", prompt=20))
    steps = [driver.submit() for _ in range(3)]
    assert steps[2] is not None
    nothing = steps[2].token_ids[:0]
    outputs = driver.scheduler.update(StepOutput(step_id=0, epoch=0, token_ids=nothing, fault=BROKEN), 1.0)

    assert [output.finish_reason for output in outputs] == [FinishReason.ERROR]
    assert driver.scheduler.state().kv_cache_usage > 0
    assert driver.scheduler.update(StepOutput(step_id=1, epoch=0, token_ids=nothing), 2.0) == []
    assert driver.scheduler.update(StepOutput(step_id=2, epoch=0, token_ids=np.array([1], dtype=np.int32)), 3.0) == []
    assert driver.scheduler.state().kv_cache_usage == 0
    driver.scheduler.check_integrity()


def test_decodes_are_spread_over_the_stages():
    driver = make_driver(token_budget=64, max_steps_in_flight=3, num_decode_groups=2)
    for index in range(8):
        driver.add(make_request(f"request-{index}", prompt=2, max_tokens=10))
    driver.submit()
    driver.land()
    first, second = driver.submit(), driver.submit()

    assert [len(tokens_of(step)) for step in (first, second)] == [4, 4]
    assert driver.submit() is None
    for _ in range(6):
        driver.land()
        assert len(tokens_of(driver.submit())) == 4  # so two steps are in flight all the time


def test_a_request_that_comes_while_all_groups_are_in_flight_makes_no_group_of_its_own():
    driver = make_driver(token_budget=64, max_steps_in_flight=3, num_decode_groups=2)
    for index in range(8):
        driver.add(make_request(f"request-{index}", prompt=2, max_tokens=20))
    driver.submit()
    driver.land()
    assert [len(tokens_of(driver.submit())) for _ in range(2)] == [4, 4]
    driver.add(make_request("late", prompt=2, max_tokens=20))
    assert tokens_of(driver.submit()) == {"late": 2}
    sizes = []
    for _ in range(8):
        driver.land()
        sizes.append(len(tokens_of(driver.submit())))

    assert sizes == [4, 4, 0, 5, 4, 5, 4, 5]  # two groups again; a third one would make each wait for two others


def test_a_request_that_fails_by_itself_takes_no_other_with_it():
    driver = make_driver(token_budget=8)
    for name in ("good", "bad"):
        driver.add(make_request(name, prompt=4))
    step = driver.submit()
    assert step is not None
    output = StepOutput(step_id=0, epoch=0, token_ids=np.array([7, 8], dtype=np.int32), errors={1: "not finite"})
    outputs = {output.request_id: output for output in driver.scheduler.update(output, 1.0)}

    assert (outputs["bad"].finish_reason, outputs["bad"].error) == (FinishReason.ERROR, "not finite")
    assert outputs["bad"].token_ids == ()
    assert (outputs["good"].finish_reason, outputs["good"].token_ids) == (None, (7,))
    assert list(driver.scheduler.request_ids()) == ["good"]
    driver.scheduler.check_integrity()


def test_a_request_whose_reader_found_its_end_counts_as_stopped():
    driver = make_driver(token_budget=8)
    driver.add(make_request("a", prompt=4, max_tokens=20))
    driver.submit()
    driver.land()
    driver.submit()

    assert driver.scheduler.stop("a", 2.0)
    assert not driver.scheduler.stop("a", 2.0)
    driver.land()
    metrics = driver.scheduler.metrics
    assert metrics.num_finished == {FinishReason.STOP: 1}
    assert metrics.e2e_request_latency_s.count == 1
    assert driver.scheduler.state().kv_cache_usage == 0


def test_a_new_request_leaves_the_watermark_free_unless_it_is_alone():
    driver = make_driver(num_blocks=10, block_size=2, watermark=0.3, token_budget=64)
    driver.add(make_request("first", prompt=15, max_tokens=4))
    driver.add(make_request("second", prompt=2, max_tokens=4))

    assert tokens_of(driver.submit()) == {"first": 15}  # 8 of 10 blocks, which is beyond the watermark
    driver.land()
    assert "second" not in tokens_of(driver.submit())


def test_a_preempted_request_comes_before_those_that_never_ran():
    driver = make_driver(num_blocks=8, block_size=2, token_budget=16, watermark=0.0)
    for name in ("old", "new", "last"):
        driver.add(make_request(name, prompt=7, max_tokens=9))
    driver.run()

    assert driver.scheduler.metrics.num_preemptions > 0
    assert list(driver.finished) == ["old", "new", "last"]


def test_after_a_restart_everything_is_computed_anew_and_nothing_is_found_in_the_cache():
    driver = make_driver(token_budget=8, max_steps_in_flight=2)
    driver.add(make_request("finished", prompt=range(8), max_tokens=1))
    driver.run()
    driver.add(make_request("decoding", prompt=range(8, 16)))
    driver.submit()
    driver.land()
    driver.add(make_request("same-prefix", prompt=range(20)))
    driver.submit()
    driver.scheduler.abort("same-prefix")
    driver.restart()
    driver.add(make_request("again", prompt=range(20)))
    step = driver.submit()

    assert step is not None
    assert step.epoch == 1
    assert tokens_of(step) == {"decoding": 8}
    assert driver.scheduler.metrics.num_recomputed_tokens == 8
    driver.run()
    assert driver.tokens["decoding"] == expected(range(8, 16), 16)
    assert driver.tokens["again"] == expected(range(20), 16)


def test_a_result_of_another_epoch_or_order_is_a_bug():
    driver = make_driver(token_budget=4, max_steps_in_flight=2)
    driver.add(make_request("a", prompt=8))
    steps = [driver.submit(), driver.submit()]
    assert steps[0] is not None
    nothing = steps[0].token_ids[:0]

    for step_id, epoch in ((1, 0), (0, 1), (7, 0)):
        with pytest.raises(AssertionError, match="the oldest is"):
            driver.scheduler.update(StepOutput(step_id=step_id, epoch=epoch, token_ids=nothing), 1.0)


def test_logprobs_reach_the_request_they_belong_to():
    driver = make_driver(token_budget=64)
    for name in ("silent", "asks"):
        driver.add(make_request(name, prompt=4, logprobs=1 if name == "asks" else None))
    step = driver.submit()
    assert step is not None
    assert step.sampling["has_logprobs"].tolist() == [0, 1]
    entry = TokenLogprobs(9, -0.5, (9,), (-0.5,))
    output = StepOutput(step_id=0, epoch=0, token_ids=np.array([8, 9], dtype=np.int32), logprobs={1: entry})
    silent, asks = driver.scheduler.update(output, 1.0)

    assert (silent.logprobs, asks.logprobs) == (None, (entry,))


def test_the_time_to_the_first_token_is_counted_once_and_gaps_for_the_rest():
    driver = make_driver(num_blocks=12, block_size=2, token_budget=8, watermark=0.0)
    for name in "abcd":
        driver.add(make_request(name, prompt=5, max_tokens=12))
    driver.run()
    metrics = driver.scheduler.metrics

    assert metrics.num_preemptions > 0
    assert metrics.time_to_first_token_s.count == metrics.request_queue_time_s.count == 4
    assert metrics.inter_token_latency_s.count == 4 * 11


@pytest.mark.parametrize(
    "settings", [{"prompt": [1, VOCAB_SIZE]}, {"logit_bias": ((VOCAB_SIZE, 1.0),)}, {"stop_token_ids": (VOCAB_SIZE,)}]
)
def test_a_token_that_the_model_does_not_have_is_refused(settings: dict):
    with pytest.raises(InvalidRequestError, match=f"token id {VOCAB_SIZE}; the model's are 0 to {VOCAB_SIZE - 1}"):
        make_scheduler().add(make_request("a", **settings))


def test_retry_after_follows_the_rate_of_the_last_minute():
    driver = make_driver(max_num_seqs=1, max_num_waiting=40)
    for index in range(40):
        driver.add(make_request(f"request-{index}", prompt=4, max_tokens=1))
    for _ in range(10):  # one request a second
        driver.submit()
        driver.land()

    def retry_after_s(now_s: float) -> float:
        with pytest.raises(OverloadedError) as caught:
            driver.scheduler.check_capacity(20, now_s)
        return caught.value.retry_after_s

    assert 10 <= retry_after_s(driver.now_s) <= 20
    assert retry_after_s(driver.now_s + 8 * 3600) == 5


def test_tokens_after_a_preemption_are_those_of_an_undisturbed_run():
    driver = make_driver(num_blocks=12, block_size=2, token_budget=8, watermark=0.0)
    requests = [make_request(name, prompt=5, max_tokens=12) for name in "abcd"]
    for request in requests:
        driver.add(request)
    driver.run()

    assert driver.scheduler.metrics.num_preemptions > 0
    for request in requests:
        prompt = request.token_ids[: request.num_prompt_tokens].tolist()
        assert driver.tokens[request.request_id] == expected(prompt, 12)
