"""How many pipelines are wanted."""

import importlib
import sys

import pytest
from ray import cloudpickle

from rayserve_sarathi.actors.autoscaling import PipelineLoad, decide


def load(**values: float) -> PipelineLoad:
    return PipelineLoad(**{"num_open_requests": 1, "max_num_seqs": 10, **values})


IDLE = load(num_open_requests=0)


@pytest.mark.parametrize(
    ("loads", "num_pipelines", "wanted"),
    [
        ([], 0, 0),
        ([IDLE], 1, 0),
        ([IDLE, IDLE, IDLE], 3, 0),
        ([load()], 1, 1),
        ([load(), IDLE, IDLE], 3, 1),
        ([load(backlog_steps=20)], 1, 1),
        ([load(backlog_steps=21)], 1, 2),
        ([load(backlog_steps=200)], 1, 10),
        ([load(backlog_steps=21), IDLE], 2, 2),
        ([load(kv_cache_usage=0.9)], 1, 1),
        ([load(kv_cache_usage=0.95)], 1, 2),
        ([load(kv_cache_usage=0.95), load(kv_cache_usage=0.95)], 2, 3),
        ([load(num_open_requests=11)], 1, 2),
        ([load(num_open_requests=25)], 1, 3),
    ],
)
def test_what_waits_and_what_is_held_tell_how_many(loads: list[PipelineLoad], num_pipelines: int, wanted: int):
    assert decide(loads, num_running=num_pipelines, num_pipelines=num_pipelines, num_queued=0) == wanted


def test_a_request_that_waits_for_a_pipeline_starts_one():
    assert decide([], num_running=0, num_pipelines=0, num_queued=0.1) == 1


def test_the_first_pipeline_may_start_though_nobody_waits_any_more():
    assert decide([], num_running=0, num_pipelines=1, num_queued=0) == 1
    assert decide([], num_running=1, num_pipelines=1, num_queued=0) == 0


def test_the_pipelines_of_initial_replicas_may_all_start():
    assert decide([], num_running=0, num_pipelines=3, num_queued=0) == 3
    assert decide([], num_running=0, num_pipelines=3, num_queued=5) == 3


def test_from_one_to_three_and_down_to_none_and_back():
    busy = load(num_open_requests=25)

    assert decide([busy], num_running=1, num_pipelines=1, num_queued=0) == 3
    assert decide([busy], num_running=1, num_pipelines=3, num_queued=0) == 3  # two are starting
    assert decide([load(num_open_requests=3), IDLE, IDLE], num_running=3, num_pipelines=3, num_queued=0) == 1
    assert decide([IDLE], num_running=1, num_pipelines=1, num_queued=0) == 0
    assert decide([], num_running=0, num_pipelines=0, num_queued=0) == 0
    assert decide([], num_running=0, num_pipelines=0, num_queued=4) == 1
    assert decide([], num_running=0, num_pipelines=1, num_queued=4) == 1
    assert decide([load()], num_running=1, num_pipelines=1, num_queued=0) == 1


@pytest.mark.parametrize(
    "half", [{"backlog_steps": 8}, {"kv_cache_usage": 0.4}, {"num_open_requests": 4}, {"prefill_share": 0.4}]
)
def test_a_pipeline_stays_if_the_others_would_be_nearly_full_without_it(half: dict[str, float]):
    assert decide([load(**half), load(**half)], num_running=2, num_pipelines=2, num_queued=0) == 2
    assert decide([load(**half), IDLE], num_running=2, num_pipelines=2, num_queued=0) == 1


def test_a_pipeline_that_always_has_prompts_but_no_backlog_is_enough():
    assert decide([load(prefill_share=1.0, backlog_steps=1)], num_running=1, num_pipelines=1, num_queued=0) == 1


def test_pipelines_that_start_are_not_wanted_twice():
    assert decide([load(backlog_steps=50)], num_running=1, num_pipelines=3, num_queued=0) == 3


def test_serve_can_take_the_policy_to_a_controller_without_this_package(monkeypatch: pytest.MonkeyPatch):
    module = importlib.import_module("rayserve_sarathi.actors.autoscaling")
    cloudpickle.register_pickle_by_value(module)
    try:
        pickled = cloudpickle.dumps(module.decide)
    finally:
        cloudpickle.unregister_pickle_by_value(module)
    for name in [name for name in sys.modules if name.split(".")[0] == "rayserve_sarathi"]:
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails

    assert cloudpickle.loads(pickled)([IDLE], num_running=1, num_pipelines=1, num_queued=0) == 0
