"""Bundles find room whenever there is any, and what is missing is named."""

import itertools
from collections.abc import Iterator, Mapping, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rayserve_sarathi.config import EngineConfig, PlacementStrategy
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.placement import Bundle, Group, Node, explain_shortage, pipeline_group, place, resolve_auto

STRATEGIES: list[PlacementStrategy] = ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


def make_group(*needs: Mapping[str, float], strategy: PlacementStrategy = "PACK", name: str = "pipeline") -> Group:
    bundles = tuple(Bundle(name=f"bundle {index}", needs=need) for index, need in enumerate(needs))
    return Group(name=name, bundles=bundles, strategy=strategy)


def make_node(name: str, total: Mapping[str, float], available: Mapping[str, float] | None = None) -> Node:
    return Node(name=name, node_id=name, total=total, available=total if available is None else available)


def is_valid(
    groups: Sequence[Group], capacities: Mapping[str, Mapping[str, float]], placed: Sequence[Sequence[str]]
) -> bool:
    for group, names in zip(groups, placed, strict=True):
        if group.strategy == "STRICT_PACK" and len(set(names)) > 1:
            return False
        if group.strategy == "STRICT_SPREAD" and len(set(names)) < len(names):
            return False
    for node, capacity in capacities.items():
        mine = [
            bundle.needs
            for group, names in zip(groups, placed, strict=True)
            for bundle, name in zip(group.bundles, names, strict=True)
            if name == node
        ]
        for resource in {resource for needs in mine for resource in needs}:
            if sum(needs.get(resource, 0) for needs in mine) > capacity.get(resource, 0) + 1e-9:
                return False
    return True


amounts = st.dictionaries(st.sampled_from(["CPU", "GPU"]), st.sampled_from([0.1, 0.5, 1.0, 2.0, 3.0]), min_size=1)
groups_of_bundles = st.lists(
    st.builds(
        lambda needs, strategy: make_group(*needs, strategy=strategy),
        st.lists(amounts, min_size=1, max_size=3),
        st.sampled_from(STRATEGIES),
    ),
    min_size=1,
    max_size=2,
)
clusters = st.lists(
    st.dictionaries(st.sampled_from(["CPU", "GPU"]), st.sampled_from([0.5, 1.0, 2.1, 4.0])), max_size=3
).map(lambda totals: {f"node {index}": total for index, total in enumerate(totals)})


@settings(max_examples=400, deadline=None)
@given(groups_of_bundles, clusters)
def test_the_search_finds_room_exactly_where_trying_everything_does(
    groups: list[Group], capacities: dict[str, dict[str, float]]
):
    def all_placements() -> Iterator[Sequence[Sequence[str]]]:
        ways = [list(itertools.product(capacities, repeat=len(group.bundles))) for group in groups]
        return itertools.product(*ways)

    placed = place(groups, capacities)
    if placed is None:
        assert not any(is_valid(groups, capacities, other) for other in all_placements())
    else:
        assert is_valid(groups, capacities, placed)


@settings(max_examples=200, deadline=None)
@given(groups_of_bundles, clusters)
def test_there_is_an_explanation_exactly_where_there_is_no_room(
    groups: list[Group], capacities: dict[str, dict[str, float]]
):
    nodes = [make_node(name, total) for name, total in capacities.items()]
    explanation = explain_shortage(groups, nodes)

    assert (explanation is None) == (place(groups, capacities) is not None)
    assert explanation is None or "\n" not in explanation


def test_a_large_cluster_is_searched_at_once():
    groups = [make_group({"CPU": 0.1}, *[{"GPU": 4, "CPU": 4}] * 4) for _ in range(32)]

    assert place(groups, {f"node {index}": {"GPU": 8, "CPU": 64} for index in range(64)}) is not None
    assert place(groups, {f"node {index}": {"GPU": 8, "CPU": 64} for index in range(63)}) is None
    # GPUs for all, but on each node a CPU too few for the schedulers beside the stages.
    assert place(groups, {f"node {index}": {"GPU": 8, "CPU": 8} for index in range(64)}) is None


def test_a_hundred_pipelines_are_searched_and_explained():
    groups = [make_group({"CPU": 0.1}, *[{"GPU": 4, "CPU": 4}] * 4, name=f"pipeline {index}") for index in range(100)]
    nodes = [make_node(f"node {index}", {"GPU": 8, "CPU": 64}) for index in range(200)]

    assert explain_shortage(groups, nodes) is None
    explanation = explain_shortage(groups, nodes[:150])
    assert explanation is not None and explanation.startswith("bundle 1 of pipeline 75 needs 4 GPU and 4 CPU")


def test_a_search_that_would_take_hours_is_given_up():
    # As many GPUs as are wanted, but a node of 7 leaves one or two idle, which only trying all mixes shows.
    groups = [make_group({"CPU": 0.1}, {"GPU": size}, {"GPU": size}) for size in (3, 5) for _ in range(20)]
    nodes = [make_node(f"node {index}", {"GPU": 8, "CPU": 9}) for index in range(38)]
    nodes += [make_node("odd", {"GPU": 7, "CPU": 9}), make_node("even", {"GPU": 9, "CPU": 9})]

    assert place(groups, {node.name: node.total for node in nodes}) is None
    assert explain_shortage(groups, nodes) is None


def test_pack_and_spread_choose_as_few_and_as_many_nodes_as_they_can():
    nodes = {name: {"CPU": 8.0} for name in "abc"}
    (packed,) = place([make_group(*[{"CPU": 2.0}] * 3, strategy="PACK")], nodes) or [()]
    (spread,) = place([make_group(*[{"CPU": 2.0}] * 3, strategy="SPREAD")], nodes) or [()]

    assert (len(set(packed)), len(set(spread))) == (1, 3)


def test_a_stage_that_no_node_can_hold_is_named_with_what_each_node_lacks():
    config = EngineConfig(model="m", device="cuda", tensor_parallel_size=4, pipeline_parallel_size=2)
    nodes = [
        make_node("10.0.0.2", {"CPU": 32, "GPU": 4}),
        make_node("10.0.0.3", {"CPU": 2, "GPU": 2}),
        make_node("10.0.0.1", {"CPU": 16}),
    ]

    assert explain_shortage([pipeline_group(config)], nodes) == (
        "stage 1 of pipeline needs 4 GPU and 4 CPU on one node;"
        " 10.0.0.2 is short of 4 GPU (0 of 4 GPU left);"
        " 10.0.0.3 is short of 2 GPU and 2 CPU (2 of 2 GPU, 2 of 2 CPU left);"
        " 10.0.0.1 is short of 4 GPU (0 of 0 GPU left);"
        " add a node with 4 GPU and 4 CPU, or lower tensor_parallel_size"
    )


def test_what_is_taken_now_is_waited_for():
    config = EngineConfig(model="m", device="cuda")
    node = make_node("a", {"CPU": 8, "GPU": 1}, {"CPU": 8})

    assert explain_shortage([pipeline_group(config)], [node]) is None
    assert explain_shortage([pipeline_group(config)], [node], now=True) == (
        "stage 0 of pipeline waits for 1 GPU and 1 CPU on one node; a is short of 1 GPU (0 of 1 GPU left);"
        " add a node with 1 GPU and 1 CPU"
    )


def test_strict_strategies_say_what_would_do_without_them():
    nodes = [make_node("a", {"CPU": 2}), make_node("b", {"CPU": 2})]
    strict_pack = make_group({"CPU": 1}, {"CPU": 2}, strategy="STRICT_PACK")
    strict_spread = make_group({"CPU": 1}, {"CPU": 1}, {"CPU": 1}, strategy="STRICT_SPREAD")

    assert explain_shortage([strict_pack], nodes) == (
        "all of pipeline (STRICT_PACK) needs 3 CPU on one node; a is short of 1 CPU (2 of 2 CPU left);"
        " b is short of 1 CPU (2 of 2 CPU left); add a node with 3 CPU, or use placement_strategy: PACK"
    )
    assert explain_shortage([strict_spread], nodes) == (
        "bundle 2 of pipeline needs 1 CPU on one node; a has another bundle of this pipeline already (STRICT_SPREAD);"
        " b has another bundle of this pipeline already (STRICT_SPREAD); add a node with 1 CPU,"
        " or use placement_strategy: SPREAD"
    )


def test_the_second_pipeline_is_named_where_the_first_finds_room():
    groups = [make_group({"GPU": 2}, name=f"pipeline {index}") for index in range(3)]
    explanation = explain_shortage(groups, [make_node("a", {"GPU": 5})])

    assert explanation is not None
    assert explanation.startswith("bundle 0 of pipeline 2 needs 2 GPU on one node; a is short of 1 GPU (1 of 5 GPU")


def test_of_many_nodes_those_that_lack_least_are_named():
    nodes = [make_node(f"n{index}", {"CPU": index}) for index in range(8)]
    explanation = explain_shortage([make_group({"CPU": 9})], nodes)

    assert explanation is not None
    assert "n7" in explanation and "n4" in explanation and "n3" not in explanation
    assert "4 other nodes lack as much or more" in explanation


@pytest.mark.parametrize(
    ("settings", "bundles"),
    [
        ({"device": "cpu", "pipeline_parallel_size": 2}, [{"CPU": 0.1}, {"CPU": 0.25}, {"CPU": 0.25}]),
        ({"device": "cuda", "tensor_parallel_size": 2}, [{"CPU": 0.1}, {"GPU": 2.0, "CPU": 2.0}]),
        ({"device": "cuda", "transport": "inline"}, [{"CPU": 0.1, "GPU": 1.0}]),
    ],
)
def test_a_pipeline_reserves_a_bundle_for_the_scheduler_and_one_for_each_stage(
    settings: dict[str, object], bundles: list[dict[str, float]]
):
    group = pipeline_group(EngineConfig(model="m", **settings))  # type: ignore[arg-type]  # fields of several types

    assert [bundle.needs for bundle in group.bundles] == bundles


@pytest.mark.parametrize(
    ("settings", "total", "resolved"),
    [
        ({}, {"CPU": 2}, ("cpu", "socket")),
        ({}, {"CPU": 2, "GPU": 1}, ("cuda", "socket")),
        ({"placement_strategy": "STRICT_PACK"}, {"CPU": 2, "GPU": 1}, ("cuda", "compiled_graph")),
        ({"wait_for_nodes": True}, {"GPU": 1}, ("cuda", "socket")),
        ({"device": "cuda", "wait_for_nodes": True}, {"CPU": 2}, ("cuda", "socket")),
        ({"device": "cpu", "wait_for_nodes": True}, {"GPU": 1}, ("cpu", "socket")),
        ({"transport": "inline"}, {"CPU": 2}, ("cpu", "inline")),
    ],
)
def test_auto_is_what_the_cluster_has(settings: dict[str, object], total: dict[str, float], resolved: tuple[str, str]):
    config = EngineConfig(model="m", **settings)  # type: ignore[arg-type]  # fields of several types
    config = resolve_auto(config, [make_node("a", total)])

    assert (config.device, config.transport) == resolved


def test_a_cluster_whose_gpus_may_be_still_to_come_wants_to_know_the_device():
    with pytest.raises(ConfigError, match="say device: cuda or device: cpu"):
        resolve_auto(EngineConfig(model="m", wait_for_nodes=True), [make_node("head", {"CPU": 0})])
