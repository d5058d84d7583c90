"""What is said of pipelines that have no place yet."""

from collections.abc import Mapping

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.placement import Node
from rayserve_sarathi.placement_wait import PlacementWait, explain_waiting

CONFIG = EngineConfig(model="m", device="cuda", transport="socket", pipeline_parallel_size=2, placement_timeout_s=300.0)
ALL = (0, 1, 2)


def make_node(name: str, total: Mapping[str, float], available: Mapping[str, float]) -> Node:
    return Node(name=name, node_id=name, total=total, available=available)


def test_a_pipeline_that_lost_a_node_waits_for_what_was_there_alone():
    # Stage 0 is on a, which has one GPU; stage 1 was on a node that is gone.
    kept = make_node("a", {"CPU": 8, "GPU": 1}, {"CPU": 6})
    other = make_node("b", {"CPU": 8, "GPU": 1}, {"CPU": 8, "GPU": 1})
    busy = make_node("b", {"CPU": 8, "GPU": 1}, {"CPU": 8})

    assert explain_waiting(CONFIG, [(2,)], [kept, other]) is None
    reason = explain_waiting(CONFIG, [(2,)], [kept, busy])
    assert reason is not None and reason.startswith("stage 1 of the pipeline waits for 1 GPU and 1 CPU on one node")
    reason = explain_waiting(CONFIG, [(2,)], [kept])
    assert reason is not None and reason.startswith("stage 1 of the pipeline needs 1 GPU and 1 CPU on one node")
    assert explain_waiting(CONFIG, [()], [kept, other]) is None
    assert explain_waiting(CONFIG, [], [kept]) is None


def test_several_pipelines_that_wait_are_told_apart():
    node = make_node("a", {"CPU": 8, "GPU": 4}, {"CPU": 8, "GPU": 3})
    reason = explain_waiting(CONFIG, [ALL, ALL], [node])

    assert reason is not None and reason.startswith("stage 1 of pipeline 1 waits for 1 GPU and 1 CPU on one node")


def test_what_waits_although_there_is_room_is_explained_and_overdue():
    wait = PlacementWait(CONFIG)
    wait.note({"group": ALL}, None, num_placed=0, now_s=0.0)
    assert (wait.explanation, wait.is_overdue) == (None, False)

    wait.note({"group": ALL}, None, num_placed=0, now_s=12.0)
    assert wait.explanation == (
        "m has waited 12 s for its place: there seems to be room, but Ray has not placed it; see `ray status`"
    )
    assert not wait.is_overdue

    wait.note({"group": ALL}, None, num_placed=0, now_s=301.0)
    assert wait.is_overdue


def test_a_shortage_is_explained_at_once_and_time_counts_whatever_the_reason():
    wait = PlacementWait(CONFIG)
    wait.note({"group": ALL}, "it is short of GPUs", num_placed=0, now_s=0.0)
    assert wait.explanation == "m has waited 0 s for its place: it is short of GPUs"

    wait.note({"group": ALL}, None, num_placed=0, now_s=200.0)
    wait.note({"group": ALL}, "it is short of CPUs", num_placed=0, now_s=301.0)
    assert wait.is_overdue


def test_clients_hear_nothing_of_it_while_another_pipeline_has_its_place():
    wait = PlacementWait(CONFIG)
    wait.note({"second": ALL}, "it is short of GPUs", num_placed=1, now_s=0.0)
    wait.note({"second": ALL}, "it is short of GPUs", num_placed=1, now_s=400.0)

    assert wait.news == "m has waited 400 s for its place: it is short of GPUs"
    assert (wait.explanation, wait.is_overdue) == (None, False)


def test_a_pipeline_that_found_its_place_waits_anew_if_it_loses_it():
    wait = PlacementWait(CONFIG)
    wait.note({"group": ALL}, None, num_placed=0, now_s=0.0)
    wait.note({}, None, num_placed=1, now_s=100.0)
    assert wait.news is None
    wait.note({"group": (2,)}, "it is short of GPUs", num_placed=0, now_s=400.0)

    assert wait.explanation == "m has waited 0 s for its place: it is short of GPUs"
    assert not wait.is_overdue
