"""What every policy promises on random traffic, with steps in flight, aborts, lost pipelines and little KV."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayserve_sarathi.config import SloConfig
from rayserve_sarathi.request import FinishReason, Request
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.ahead import AHEAD_S
from rayserve_sarathi.scheduling.base import Scheduler
from tests.factories import expected, make_request, make_scheduler
from tests.scheduling.driver import Driver

NUM_SLOTS = 48
HYBRID = {"sarathi", "orca", "hybrid_only"}
"""Policies that leave no decode out of a step; the others may compute prompts first."""
BUDGETED = {"sarathi", "chunked_only"}
"""Policies that keep the token budget; the others take whole prompts."""
TARGET_STEPS = (None, 0.1, 1.5, 5.0)
"""Of `token_budget: auto`, in steps, which all take as long."""

traffic = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 4, 16]),
        "token_budget": st.integers(1, 24),
        "max_num_seqs": st.integers(1, 8),
        "max_num_partial_prefills": st.integers(1, 3),
        "max_steps_in_flight": st.integers(1, 4),
        "num_decode_groups": st.integers(1, 3),
        "watermark": st.sampled_from([0.0, 0.1]),
        "enable_prefix_caching": st.booleans(),
        "requests": st.lists(
            # length of a shared prefix, own tokens, tokens to generate
            st.tuples(st.integers(0, 12), st.integers(1, 12), st.integers(1, 16)),
            min_size=1,
            max_size=12,
        ),
        "actions": st.lists(
            st.sampled_from(["add", "submit", "submit", "land", "land", "abort", "restart"]), max_size=80
        ),
        "is_async": st.booleans(),
        "seed": st.integers(0, 2**16),
        "target_steps": st.sampled_from(TARGET_STEPS),
    }
)


@pytest.mark.parametrize(
    ("policy", "is_auto"), [*((policy, False) for policy in sorted(SCHEDULERS)), ("sarathi", True)]
)
@given(case=traffic)
@settings(max_examples=150, deadline=None, derandomize=True)
def test_random_traffic(policy: str, is_auto: bool, case: dict):
    case = dict(case)
    if case["is_async"]:
        case |= {"max_steps_in_flight": 1, "num_decode_groups": 1}
    step_s = 0.5 * AHEAD_S if case["is_async"] else 1.0
    target_steps = case.pop("target_steps")
    case["slo"] = SloConfig(tbt_s=target_steps and target_steps * step_s)
    if is_auto:
        case |= {"token_budget": "auto", "max_num_batched_tokens": case["token_budget"]}
    requests, actions, seed = case.pop("requests"), case.pop("actions"), case.pop("seed")
    block_size = case["block_size"]
    num_blocks = -(-NUM_SLOTS // block_size)
    scheduler = make_scheduler(policy, num_blocks=num_blocks, max_model_len=NUM_SLOTS, **case)
    driver = Driver(scheduler, num_blocks=num_blocks, block_size=block_size, step_s=step_s)
    rng = np.random.default_rng(seed)
    prefix = rng.integers(0, 1000, 12).tolist()
    waiting = [
        make_request(
            f"request-{index}",
            prompt=prefix[:num_shared] + rng.integers(0, 1000, num_own).tolist(),
            max_tokens=num_output,
            cache_salt="ab"[index % 2],
        )
        for index, (num_shared, num_own, num_output) in enumerate(requests)
    ]
    prompts = {request.request_id: request.token_ids.tolist() for request in waiting}
    goals = {request.request_id: request.sampling.max_tokens for request in waiting}
    waiting.reverse()
    aborted: set[str] = set()
    for action in actions:
        if action == "add" and waiting:
            driver.add(waiting.pop())
        elif action == "submit":
            submit_and_check(driver, policy, case["num_decode_groups"], is_async=case["is_async"])
        elif action == "land" and driver.num_in_flight:
            driver.land()
        elif action == "restart":
            driver.restart()
        elif action == "abort" and (alive := sorted(scheduler.request_ids())):
            victim = alive[int(rng.integers(len(alive)))]
            aborted.add(victim)
            assert scheduler.abort(victim)
    while waiting:
        driver.add(waiting.pop())
    while scheduler.has_unfinished_requests:
        while submit_and_check(driver, policy, case["num_decode_groups"], is_async=case["is_async"]):
            pass
        driver.land()
    assert len(driver.steps) < 3000

    assert scheduler.state().kv_cache_usage == 0
    for request_id, tokens in driver.tokens.items():
        goal = expected(prompts[request_id], goals[request_id])
        if request_id in driver.finished:
            assert driver.finished[request_id] is FinishReason.LENGTH
            assert tokens == goal, f"{request_id} has other tokens than when it runs alone"
        else:
            assert request_id in aborted, f"{request_id} never ended"
            assert tokens == goal[: len(tokens)]
    metrics = scheduler.metrics
    assert metrics.num_started == sum(metrics.num_finished.values()) == len(driver.tokens)


def submit_and_check(driver: Driver, policy: str, num_decode_groups: int, *, is_async: bool) -> bool:
    """Submit a step and hold it against the promises; return whether there was one."""
    scheduler = driver.scheduler
    running_before = list(scheduler.running)
    queued_before = [request for request in driver.requests.values() if request not in running_before]
    queued_before = [request for request in queued_before if request.request_id in set(scheduler.request_ids())]
    decoding = [
        request
        for request in running_before
        if request.num_output_tokens > 0
        and request.num_tokens - request.num_computed_tokens == 1
        and not request.num_in_flight_tokens
    ]
    in_flight = {request.request_id for request in running_before if request.num_in_flight_tokens}
    # Scheduled ahead: decodes of a token that is on its way.
    pending = {
        request.request_id
        for request in running_before
        if is_async and 0 < request.num_in_flight_tokens == request.num_tokens - request.num_computed_tokens
    }
    could_submit = driver.num_in_flight
    step = driver.submit()
    if step is None:
        # With nothing in flight there is always something to compute, and it is the oldest request's turn.
        assert could_submit or not scheduler.has_unfinished_requests
        return False
    chunks = step.num_scheduled_tokens
    decodes = {request.request_id for request in decoding} & set(chunks)

    if policy in BUDGETED:
        num_decodes = len(decodes | (pending & set(chunks)))
        assert step.num_tokens <= max(scheduler.config.max_token_budget, num_decodes), "the budget is not kept"
    assert len(scheduler.running) <= scheduler.config.max_num_seqs
    assert not decodes & in_flight, "a decode is in two steps in flight"
    assert len(pending & set(chunks)) == (0 if step.pending is None else len(step.pending.positions))
    running_after = {request.request_id for request in scheduler.running}
    assert not in_flight - running_after, "a request in flight was preempted"

    if policy in HYBRID:
        assert_decodes_are_not_skipped(scheduler, decoding, in_flight, chunks, num_decode_groups)

    half_prefilled = [
        request
        for request in scheduler.running
        if request.num_tokens - request.num_scheduled_tokens > 0
        and request.num_output_tokens == 0
        and request.num_preemptions == 0
    ]
    is_auto = scheduler.config.token_budget == "auto"
    # A very long prompt leaves a share to one behind it.
    assert len(half_prefilled) <= scheduler.config.max_num_partial_prefills + is_auto
    admitted = [request.order for request in scheduler.running if request not in running_before]
    still_queued = [request.order for request in queued_before if request.request_id not in running_after]
    preempted_now = [request.order for request in running_before if request.request_id not in running_after]
    assert not admitted or not preempted_now, "a request was admitted into the blocks of one that still needs them"
    assert max(admitted, default=-1) < min(still_queued, default=2**31), "a request was admitted before an older one"
    if policy in HYBRID and could_submit == 0 and running_before and not is_auto:
        oldest = running_before[0]
        assert oldest.request_id in chunks or len(decodes) >= scheduler.config.max_token_budget, (
            "the oldest made no progress"
        )
    return True


def assert_decodes_are_not_skipped(
    scheduler: Scheduler, decoding: list[Request], in_flight: set[str], chunks: dict[str, int], num_decode_groups: int
) -> None:
    """A decode waits only for its turn behind a full group of older ones, or for blocks that a step in flight holds."""
    taken = [request for request in decoding if request.request_id in chunks]
    num_decoding = len(decoding) + sum(
        request.request_id in in_flight
        and request.num_output_tokens > 0
        and request.num_tokens - request.num_computed_tokens == 1
        for request in scheduler.running
    )
    running = set(scheduler.running)
    for request in decoding:
        if request not in running or request in taken:
            continue
        is_behind_a_full_group = len(taken) >= num_decoding // num_decode_groups and (
            num_decode_groups > 1 and all(other.order < request.order for other in taken)
        )
        assert is_behind_a_full_group or in_flight, f"{request} was skipped"
