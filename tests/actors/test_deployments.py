"""Each deployment file, started on CPUs with its own parallelism and otherwise as its README says for a laptop.

One cluster of two nodes serves them one after another, deployed as `serve deploy` does.
"""

import json
import os
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.actors.cluster import free_port, ray_environment
from tests.deployment_files import FAMILIES, laptop_args, read_file

pytestmark = pytest.mark.ray

TINY = {"model": "sarathi-tiny", "device": "cpu", "max_model_len": 256}
# A stage of four CPUs, twice what a node has.
LARGE = {
    **TINY,
    "load_format": "dummy",
    "hf_overrides": {"num_attention_heads": 16, "num_key_value_heads": 16},
    "tensor_parallel_size": 16,
}
DOCTOR = "import sys; from rayserve_sarathi.cli import main; sys.exit(main())"


class TwoNodes:
    """A cluster of two nodes, and the Serve instance on it.

    Args:
        address: Of the cluster.
        dashboard_url: Where deployments are sent.
        environment: Of its processes.
    """

    def __init__(self, address: str, dashboard_url: str, environment: dict[str, str]) -> None:
        self.address = address
        self.environment = environment
        self._api = f"{dashboard_url}/api/serve/applications/"
        self._port = free_port()
        self.url = f"http://127.0.0.1:{self._port}"

    def deploy(self, applications: list[dict[str, Any]]) -> None:
        """Replace all applications by these, as `serve deploy` does."""
        # Both nodes have this machine's ports, so there may be one proxy only.
        config = {
            "proxy_location": "HeadOnly",
            "http_options": {"host": "127.0.0.1", "port": self._port, "request_timeout_s": None},
            "applications": applications,
        }
        self._call("PUT", self._api, config)

    def status(self, name: str) -> tuple[str, str]:
        """Return an application's status, and the message that goes with it."""
        application = self._call("GET", self._api)["applications"].get(name, {})
        return application.get("status", ""), application.get("message", "")

    def request(
        self, path: str, body: dict[str, Any] | None = None, *, timeout_s: float = 2.0
    ) -> tuple[int, dict[str, Any]]:
        """Return status and answer of a GET, or with a body of a POST; status 0 where nobody answers in time.

        The time is short, as a proxy that does not know the application yet may let a request wait for ever.
        """
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, {"Content-Type": "application/json"})
        try:
            with urllib.request.urlopen(request, timeout=timeout_s) as answer:
                return answer.status, json.load(answer)
        except urllib.error.HTTPError as error:
            with error:
                content = error.read()
                return error.code, json.loads(content) if content[:1] == b"{" else {"text": content.decode()}
        except OSError:
            return 0, {}

    def _call(self, method: str, url: str, body: dict[str, Any] | None = None) -> Any:
        headers = {"Authorization": f"Bearer {os.environ['RAY_AUTH_TOKEN']}", "Content-Type": "application/json"}
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data, headers, method=method)
        with urllib.request.urlopen(request, timeout=60) as answer:
            content = answer.read()
        return json.loads(content) if content else None


def wait_until(is_true: Any, *, timeout_s: float, message: Any) -> None:
    deadline_s = time.monotonic() + timeout_s
    while not is_true():
        assert time.monotonic() < deadline_s, message()
        time.sleep(0.1)  # a condition of another process: there is no event to wait for


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TwoNodes]:
    log = tmp_path_factory.mktemp("cluster") / "cluster.log"
    with ray_environment() as environment, log.open("w") as stderr:
        port = free_port()
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.actors.two_nodes", str(port), "2"],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=stderr,
            text=True,
        )
        assert process.stdin is not None and process.stdout is not None
        try:
            address = process.stdout.readline().strip()
            assert address, log.read_text()[-4000:]
            yield TwoNodes(address, f"http://127.0.0.1:{port}", environment)
        finally:
            process.stdin.close()
            process.wait(60)
            process.stdout.close()


def complete(cluster: TwoNodes, application: dict[str, Any]) -> dict[str, Any]:
    """Deploy an application, wait until it runs, and return the answer to a request for three tokens."""
    name = application["name"]
    cluster.deploy([application])

    def is_running() -> bool:
        status, message = cluster.status(name)
        assert status != "DEPLOY_FAILED", message
        return status == "RUNNING"

    wait_until(is_running, timeout_s=120, message=lambda: f"not running: {cluster.status(name)}")
    body = {
        "model": application["args"]["model"],
        "prompt": "Once upon a time",
        "max_tokens": 3,
        "ignore_eos": True,
        "temperature": 0,
    }
    answers: list[tuple[int, dict[str, Any]]] = []

    def is_known() -> bool:
        # The proxy learns of a new application a moment after it runs, and until then may ask the one before.
        answers.append(cluster.request("/v1/models"))
        return body["model"] in [model["id"] for model in answers[-1][1].get("data", ())]

    def is_answered() -> bool:
        answers.append(cluster.request("/v1/completions", body, timeout_s=30))
        return answers[-1][0] == 200

    for is_done in (is_known, is_answered):
        wait_until(is_done, timeout_s=90, message=lambda: f"no answer: {answers[-1]}")
    return answers[-1][1]


def run_doctor(cluster: TwoNodes, folder: Path, args: dict[str, Any]) -> "subprocess.CompletedProcess[str]":
    application = {"name": "app", "import_path": "rayserve_sarathi.actors.app:build_app", "args": args}
    (folder / "app.yaml").write_text(yaml.safe_dump({"applications": [application]}))
    return subprocess.run(
        [sys.executable, "-c", DOCTOR, "doctor", str(folder / "app.yaml"), "--address", cluster.address],
        env=cluster.environment,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_doctor_reports_places_memory_and_links(cluster: TwoNodes, tmp_path: Path):
    result = run_doctor(cluster, tmp_path, laptop_args("falcon180b.yaml", tmp_path))

    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 nodes" in result.stdout
    assert "ok       placement: there is room, for instance with the scheduler and stage" in result.stdout
    assert "room for about 1,024 tokens: 4 requests of max_model_len=256" in result.stdout
    assert "ok       links: 2 links probed: round trips of" in result.stdout
    assert result.stdout.endswith("this can work: no problem found\n")


def test_doctor_says_what_can_never_be_placed(cluster: TwoNodes, tmp_path: Path):
    result = run_doctor(cluster, tmp_path, LARGE)

    assert result.returncode == 1, result.stdout + result.stderr
    assert "problem  placement: can never be placed: stage 0 of app needs 4 CPU on one node; " in result.stdout
    assert "is short of 2 CPU (2 of 2 CPU left)" in result.stdout


def test_what_can_never_be_placed_is_refused_with_the_reason(cluster: TwoNodes):
    application = read_file("tiny.yaml")["applications"][0]
    cluster.deploy([{**application, "name": "large", "args": LARGE}])

    wait_until(lambda: cluster.status("large")[0] == "DEPLOY_FAILED", timeout_s=60, message=lambda: "not refused")
    _, message = cluster.status("large")
    assert "this cluster can never hold sarathi-tiny: stage 0 of pipeline needs 4 CPU on one node; " in message
    assert "add a node with 4 CPU, or lower tensor_parallel_size" in message
    assert "set wait_for_nodes: true" in message


def test_what_waits_for_nodes_says_so_to_its_clients(cluster: TwoNodes):
    args = {**LARGE, "wait_for_nodes": True, "placement_timeout_s": 0.1}
    application = {**read_file("tiny.yaml")["applications"][0], "name": "waits", "args": args}
    cluster.deploy([application])
    body = {"model": "sarathi-tiny", "prompt": "Once", "max_tokens": 1}
    answers: list[tuple[int, dict[str, Any]]] = []

    def is_explained() -> bool:
        answers.append(cluster.request("/v1/completions", body))
        return answers[-1][0] == 503 and "for its place" in str(answers[-1][1])

    wait_until(is_explained, timeout_s=60, message=lambda: f"no explanation: {answers[-1]}")
    message = answers[-1][1]["error"]["message"]
    assert message.startswith("no pipeline is ready: sarathi-tiny has waited ")
    assert "stage 0 of the pipeline needs 4 CPU on one node; " in message


@pytest.mark.parametrize("name", FAMILIES)
def test_a_file_starts_with_its_parallelism_and_answers(cluster: TwoNodes, tmp_path: Path, name: str):
    application = read_file(name)["applications"][0]
    answer = complete(cluster, {**application, "args": laptop_args(name, tmp_path)})

    assert answer["usage"]["completion_tokens"] == 3


def test_autoscaling_starts_a_pipeline_for_the_first_request(cluster: TwoNodes):
    application = read_file("autoscaling.yaml")["applications"][0]
    answer = complete(cluster, application)

    assert answer["usage"]["completion_tokens"] == 3
