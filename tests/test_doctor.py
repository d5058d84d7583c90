"""What the doctor says of files, nodes and links that are made up."""

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from rayserve_sarathi.cli import main
from rayserve_sarathi.deployment_file import IMPORT_PATH, read_deployment
from rayserve_sarathi.doctor import Finding, LinkResult, Report, examine, render
from rayserve_sarathi.links import LinkSpeed
from rayserve_sarathi.placement import Node

GIB = 1024**3
SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 32000,
    "hidden_size": 8192,
    "intermediate_size": 28672,
    "num_hidden_layers": 80,
    "num_attention_heads": 64,
    "num_key_value_heads": 8,
    "max_position_embeddings": 4096,
    "dtype": "float16",
}
LARGE = {"tensor_parallel_size": 4, "pipeline_parallel_size": 2}


@pytest.fixture
def model(tmp_path: Path) -> str:
    (tmp_path / "config.json").write_text(json.dumps(SHAPE))
    return str(tmp_path)


def make_node(name: str, *, kind: str = "A100-80G", **total: float) -> Node:
    resources = {"CPU": 16.0, "memory": 64.0 * GIB, **total}
    if "GPU" in resources:
        resources[f"accelerator_type:{kind}"] = 1.0
    return Node(name=name, node_id=name, total=resources, available=resources)


def diagnose(
    folder: Path, args: dict[str, Any], *nodes: Node, links: tuple[LinkResult, ...] = (), **entry: Any
) -> Report:
    file = folder / "app.yaml"
    application = {"name": "app", "import_path": IMPORT_PATH, "args": args, **entry}
    file.write_text(yaml.safe_dump({"applications": [application]}))
    return examine(str(file), read_deployment(file), nodes, links, gpu_memory_gib=None)


def of_topic(report: Report, topic: str) -> list[Finding]:
    return [finding for findings in report.sections.values() for finding in findings if finding.topic == topic]


def test_a_large_model_on_two_nodes_can_work(tmp_path: Path, model: str):
    report = diagnose(tmp_path, {"model": model, **LARGE}, make_node("a", GPU=4), make_node("b", GPU=4))

    assert report.can_work
    (placement,) = of_topic(report, "placement")
    assert placement.text == "there is room, for instance with the scheduler and stage 0 on a, stage 1 on b"
    (memory,) = of_topic(report, "memory")
    # 69e9 weights of 2 bytes over 8 ranks; keys and values of 40 layers, 2 heads, 128 numbers of 2 bytes.
    assert memory.text.startswith("a rank holds up to 16.06 GiB of weights and 40.00 KiB of KV a token; there is room")
    assert "requests of max_model_len=4,096" in memory.text


def test_nodes_that_are_too_small_are_a_problem_with_the_reason(tmp_path: Path, model: str):
    report = diagnose(tmp_path, {"model": model, **LARGE}, make_node("a", GPU=4), make_node("b", GPU=2))

    assert not report.can_work
    (placement,) = of_topic(report, "placement")
    assert placement.level == "problem"
    assert "stage 1 of app needs 4 GPU and 4 CPU on one node; b is short of 2 GPU (2 of 2 GPU left)" in placement.text
    assert [finding.level for finding in of_topic(report, "memory")] == ["skipped"]


def test_a_cluster_that_grows_is_only_warned_of(tmp_path: Path, model: str):
    report = diagnose(tmp_path, {"model": model, "wait_for_nodes": True, **LARGE}, make_node("a", GPU=4))

    assert report.can_work
    assert [finding.level for finding in of_topic(report, "placement")] == ["warning"]


def test_what_runs_now_is_a_warning(tmp_path: Path):
    node = make_node("a")
    busy = Node(name="a", node_id="a", total=node.total, available={"CPU": 0.2})
    report = diagnose(tmp_path, {"model": "sarathi-tiny"}, busy)

    assert report.can_work
    text = of_topic(report, "placement")[1].text
    assert text.startswith("not at present, as other things run: stage 0 of app waits for 0.25 CPU")


def test_weights_that_do_not_fit_are_a_problem(tmp_path: Path, model: str):
    report = diagnose(tmp_path, {"model": model}, make_node("a", GPU=1, kind="T4"))

    (memory,) = of_topic(report, "memory")
    assert memory.level == "problem"
    assert memory.text.startswith("stage 0 needs 128.")
    assert "use more stages or ranks" in memory.text


def test_ranks_in_one_process_on_gpus_are_a_problem(tmp_path: Path, model: str):
    args = {"model": model, "transport": "inline", "tensor_parallel_size": 2}

    on_gpus = diagnose(tmp_path, args, make_node("a", GPU=2))

    (settings,) = of_topic(on_gpus, "settings")
    assert settings.level == "problem"
    assert "with transport inline runs on CPUs only" in settings.text
    assert diagnose(tmp_path, {**args, "device": "cpu"}, make_node("a", memory=999 * GIB)).can_work


def test_a_name_of_several_sizes_is_a_warning_where_only_the_larger_will_do(tmp_path: Path, model: str):
    def examine_on(kind: str, *, num_ranks: int) -> Finding:
        args = {"model": model, "tensor_parallel_size": num_ranks}
        (memory,) = of_topic(diagnose(tmp_path, args, make_node("a", GPU=num_ranks, kind=kind)), "memory")
        return memory

    assert examine_on("A100", num_ranks=8).level == "ok"
    warning = examine_on("A100", num_ranks=4)
    assert warning.level == "warning"
    assert warning.text.startswith(
        "GPUs of this name have several sizes. With the largest, a rank holds up to 32.12 GiB of weights"
    )
    assert ". With the smallest, a rank of stage 0 has room for the KV of " in warning.text
    assert warning.text.endswith(". Say which with --gpu-memory-gib")
    assert examine_on("V100", num_ranks=2).level == "problem"


def test_a_label_with_the_size_says_more_than_the_one_that_ray_adds(tmp_path: Path, model: str):
    node = make_node("a", GPU=4, kind="A100-80G", **{"accelerator_type:A100": 1.0})
    report = diagnose(tmp_path, {"model": model, "tensor_parallel_size": 4}, node)

    assert [finding.level for finding in of_topic(report, "memory")] == ["ok"]
    assert "a: 4 GPU and 16 CPU (A100-80G)" in render(report)


def test_an_unknown_accelerator_asks_for_its_memory(tmp_path: Path, model: str):
    report = diagnose(tmp_path, {"model": model}, make_node("a", GPU=1, kind="ABACUS"))

    assert of_topic(report, "memory")[0].text == (
        "no GPU memory is known for a (accelerator types: ['ABACUS']); give --gpu-memory-gib"
    )


def test_a_model_that_is_not_here_is_skipped_with_the_reason(tmp_path: Path):
    report = diagnose(tmp_path, {"model": "nobody/nothing", "device": "cpu"}, make_node("a"))

    assert report.can_work
    (memory,) = of_topic(report, "memory")
    assert memory.level == "skipped"
    assert memory.text.startswith("there is no config.json to go by: model 'nobody/nothing' is no folder here")


def test_a_setting_that_is_wrong_and_a_length_that_is_too_long_are_problems(tmp_path: Path):
    wrong = diagnose(tmp_path, {"model": "sarathi-tiny", "blok_size": 3}, make_node("a"))
    long = diagnose(tmp_path, {"model": "sarathi-tiny", "max_model_len": 10**6}, make_node("a"))

    assert "did you mean block_size" in of_topic(wrong, "settings")[0].text
    assert "max_model_len=1000000 exceeds the 2048 positions" in of_topic(long, "memory")[0].text
    assert not wrong.can_work and not long.can_work


def test_replicas_and_scaling_are_counted(tmp_path: Path):
    def scheduler(**options: Any) -> list[dict[str, Any]]:
        return [{"name": "SchedulerActor", **options}]

    args, node = {"model": "sarathi-tiny"}, make_node("a", CPU=1)
    fixed = diagnose(tmp_path, args, node, deployments=scheduler(num_replicas=3))
    scaled = diagnose(
        tmp_path, args, node, deployments=scheduler(autoscaling_config={"min_replicas": 0, "max_replicas": 3})
    )

    assert "stage 0 of pipeline 2 of app needs 0.25 CPU on one node" in of_topic(fixed, "placement")[0].text
    assert not fixed.can_work
    assert [finding.level for finding in of_topic(scaled, "placement")] == ["ok", "warning"]
    assert "not all 3 pipelines that it may scale up to: " in of_topic(scaled, "placement")[1].text


def test_a_search_that_was_given_up_is_a_warning(tmp_path: Path):
    application = {"import_path": IMPORT_PATH, "args": {"model": "sarathi-tiny", "device": "cpu"}}
    entries = [
        {**application, "name": name, "args": {**application["args"], "num_cpus_per_rank": num_cpus}}
        for name, num_cpus in (("small", 2.9), ("large", 4.9))
    ]
    deployments = [{"name": "SchedulerActor", "num_replicas": 20}]
    file = tmp_path / "app.yaml"
    file.write_text(yaml.safe_dump({"applications": [{**entry, "deployments": deployments} for entry in entries]}))
    nodes = [make_node(f"n{index}", CPU=8) for index in range(18)]
    nodes += [make_node("odd", CPU=7), make_node("even", CPU=9)]
    report = examine(str(file), read_deployment(file), nodes, [], gpu_memory_gib=None)

    assert [finding.level for finding in of_topic(report, "placement")] == ["ok", "warning"]
    assert of_topic(report, "placement")[1].text == "no room found in 20,000 tries, after which the search ends"


def test_applications_of_one_file_share_the_cluster(tmp_path: Path):
    application = {"import_path": IMPORT_PATH, "args": {"model": "sarathi-tiny"}}
    file = tmp_path / "app.yaml"
    file.write_text(yaml.safe_dump({"applications": [{**application, "name": name} for name in ("one", "two")]}))
    report = examine(str(file), read_deployment(file), [make_node("a", CPU=0.5)], [], gpu_memory_gib=None)

    assert [finding.level for finding in of_topic(report, "placement")] == ["ok", "problem"]


def test_an_application_of_others_is_left_alone(tmp_path: Path):
    report = diagnose(tmp_path, {}, make_node("a"), import_path="other:app")

    assert report.can_work
    assert [finding.level for finding in of_topic(report, "settings")] == ["skipped"]


def test_a_bad_link_is_named_and_a_slow_one_warned_of(tmp_path: Path):
    good, slow = LinkSpeed(round_trip_s=1e-4, bytes_per_s=1e9), LinkSpeed(round_trip_s=2e-2, bytes_per_s=1e7)
    links = (
        LinkResult(source="a", target="b", outcome=good),
        LinkResult(source="b", target="a", outcome=good),
        LinkResult(source="a", target="c", outcome=slow),
        LinkResult(source="c", target="a", outcome="no connection within 5 s"),
        LinkResult(source="d", target=None, outcome="no process could be started there: no answer within 60 s"),
    )
    nodes = [make_node(name) for name in "abcd"]
    findings = of_topic(diagnose(tmp_path, {"model": "sarathi-tiny"}, *nodes, links=links), "links")

    assert [(finding.level, finding.text) for finding in findings] == [
        (
            "ok",
            "3 links probed: round trips of 0.10 to 20.00 ms, 0.1 to 8.0 Gbit/s over one TCP connection",
        ),
        ("problem", "c -> a: no connection within 5 s"),
        ("problem", "d: no process could be started there: no answer within 60 s"),
        ("warning", "a -> c: 0.1 Gbit/s, less than a quarter of what others have"),
    ]


def test_the_report_is_readable_and_so_is_its_json(tmp_path: Path):
    report = diagnose(tmp_path, {"model": "sarathi-tiny"}, make_node("10.0.0.2"))
    text = render(report)

    assert text.splitlines()[2:4] == ["nodes", "  10.0.0.2: 16 CPU, 64.0 GiB; free now: 16 CPU"]
    assert "  ok       settings: sarathi-tiny on cpu, 1 pipeline of 1 stage\n" in text
    assert text.endswith("this can work: no problem found\n")
    assert json.loads(json.dumps(report.to_json()))["can_work"] is True


def test_the_command_says_what_is_wrong_with_its_file(capsys: pytest.CaptureFixture[str]):
    assert main(["doctor", "/no/such/file.yaml"]) == 1
    assert capsys.readouterr().err.startswith("sarathi: /no/such/file.yaml cannot be read")
