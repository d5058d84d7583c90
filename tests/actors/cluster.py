"""A Ray cluster of a test's own: its temporary folder, ports and token are no other's, and it ends with the test."""

import os
import re
import secrets
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml

SCHEDULER = "ray::ServeReplica:test:SchedulerActor"
"""How the processes of a server's schedulers are titled."""


def free_port() -> int:
    """Return a port of 127.0.0.1 that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextmanager
def ray_environment() -> Iterator[dict[str, str]]:
    """Yield the environment of a private cluster."""
    # Not pytest's tmp_path: Ray puts sockets there, whose paths may have 107 characters.
    folder = tempfile.mkdtemp(prefix="rs-", dir="/tmp")
    first_port = 20_000 + 40 * secrets.randbelow(240)
    environment = {
        **os.environ,
        "RAY_TMPDIR": folder,
        # Else a line that two processes write alike is shown once.
        "RAY_DEDUP_LOGS": "0",
        # As `make serve` does, with files and ports that are no other cluster's.
        "RAY_SERVE_ENABLE_HA_PROXY": "1",
        "RAY_SERVE_HAPROXY_BINARY_PATH": str(Path(__file__).resolve().parents[2] / "scripts" / "haproxy"),
        "RAY_SERVE_THROUGHPUT_OPTIMIZED": "1",
        "RAY_SERVE_LOG_TO_STDERR": "1",
        "RAY_SERVE_DIRECT_INGRESS_MIN_DRAINING_PERIOD_S": "0",
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/haproxy/admin.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": f"{folder}/haproxy",
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/haproxy/server-state",
        # Otherwise the ingresses of two clusters take their ports from one range, and HAProxy asks the wrong one.
        "RAY_SERVE_DIRECT_INGRESS_MIN_HTTP_PORT": str(first_port),
        "RAY_SERVE_DIRECT_INGRESS_MAX_HTTP_PORT": str(first_port + 19),
        "RAY_SERVE_DIRECT_INGRESS_MIN_GRPC_PORT": str(first_port + 20),
        "RAY_SERVE_DIRECT_INGRESS_MAX_GRPC_PORT": str(first_port + 39),
        # Serve's own proxy, which HAProxy asks until an ingress is up; two of one port would share its connections.
        "RAY_SERVE_FALLBACK_PROXY_HTTP_PORT": str(free_port()),
        "RAY_SERVE_FALLBACK_PROXY_GRPC_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_METRICS_PORT": str(free_port()),
        "RAY_SERVE_HAPROXY_STATS_PORT": str(free_port()),
    }
    environment.pop("RAY_ADDRESS", None)
    try:
        yield environment
    finally:
        shutil.rmtree(folder, ignore_errors=True)


class Server:
    """A `serve run` that answers.

    Args:
        url: Where.
        environment: That of its cluster.
        log: What it has written.
    """

    def __init__(self, url: str, environment: dict[str, str], log: Path) -> None:
        self.url = url
        self.environment = environment
        self._log = log

    @property
    def client_environment(self) -> dict[str, str]:
        """That of another application's process, which knows where the cluster is and nothing of how Serve runs."""
        own = {name: value for name, value in self.environment.items() if not name.startswith("RAY_SERVE_")}
        return {**own, "RAY_ADDRESS": "auto"}

    @property
    def log(self) -> str:
        """All that the server has written so far."""
        return self._log.read_text(errors="replace")

    def get(self, path: str, *, timeout_s: float = 10.0) -> tuple[int, str]:
        """Return status and body of a GET."""
        try:
            with urllib.request.urlopen(self.url + path, timeout=timeout_s) as response:
                return response.status, response.read().decode()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read().decode()

    def is_ready(self) -> bool:
        """Whether `/health/ready` says so."""
        try:
            return self.get("/health/ready")[0] == 200
        except OSError:
            return False

    def pids(self, title: str) -> list[int]:
        """Return the processes of its cluster whose title begins with `title`, such as `ray::StageActor`."""
        mark = f"RAY_TMPDIR={self.environment['RAY_TMPDIR']}".encode()
        found = []
        for process in Path("/proc").glob("[0-9]*"):
            try:
                is_ours = mark in (process / "environ").read_bytes().split(b"\0")
                if is_ours and (process / "cmdline").read_bytes().startswith(title.encode()):
                    found.append(int(process.name))
            except (FileNotFoundError, ProcessLookupError, PermissionError):
                continue  # it has ended, or is another user's
        return sorted(found)

    def stage_pid(self, stage: int, *, tp_rank: int = 0) -> int:
        """Return the process of a rank of a stage, which the log tells."""
        alive = set(self.pids("ray::StageActor"))
        told = re.findall(rf"\(StageActor pid=(\d+)[^)]*\).*: stage {stage}, rank {tp_rank} of", self.log)
        (pid,) = {int(pid) for pid in told} & alive
        return pid

    def raylets(self, title: str) -> set[int]:
        """Return the raylets, one a node, that have started the processes with such titles."""
        status = [Path(f"/proc/{pid}/status").read_text() for pid in self.pids(title)]
        return {int(line.split()[1]) for lines in status for line in lines.splitlines() if line.startswith("PPid:")}

    def metrics(self, name: str) -> list[float]:
        """Return the values of a metric, in the order of its labels."""
        _, text = self.get("/metrics")
        lines = sorted(line for line in text.splitlines() if line.split("{")[0] == f"sarathi_{name}")
        return [float(line.rsplit(" ", 1)[1]) for line in lines]

    def metric(self, name: str) -> float:
        """Return the sum of a metric over its labels."""
        values = self.metrics(name)
        assert values, f"no metric sarathi_{name}"
        return sum(values)

    def wait_until(self, is_true: Any, *, timeout_s: float, message: str) -> float:
        """Wait for a condition; return how long it took."""
        begin_s = time.monotonic()
        while not is_true():
            assert time.monotonic() - begin_s < timeout_s, f"{message} within {timeout_s} s"
            time.sleep(0.02)  # a condition of another process: there is no event to wait for
        return time.monotonic() - begin_s


@contextmanager
def serve_run(folder: Path, args: dict[str, Any], *, deployments: Sequence[dict[str, Any]] = ()) -> Iterator[Server]:
    """Start `serve run` with an application named `test`; yield once it is ready; stop it as Ctrl-C does.

    Args:
        folder: Where its file and its log go.
        args: Those of the application.
        deployments: Overrides of deployments' options, as in a Serve config file.
    """
    command = [str(Path(sys.executable).with_name("serve")), "run"]
    with _serving(folder, command, args, deployments) as (server, _):
        yield server


@contextmanager
def serve_on_nodes(folder: Path, args: dict[str, Any]) -> Iterator[tuple[Server, Callable[[int], None]]]:
    """Serve on a cluster of several nodes, the ingress on the one that stays; see `node_cluster`.

    Returns:
        The server, and what takes the node away that has this raylet.
    """
    command = [sys.executable, "-m", "tests.actors.node_cluster"]
    ingress = {"name": "OpenAIIngress", "ray_actor_options": {"num_cpus": 0, "resources": {"head": 0.1}}}
    with _serving(folder, command, args, [ingress]) as (server, process):

        def remove(raylet: int) -> None:
            assert process.stdin is not None
            process.stdin.write(f"remove {raylet}\n".encode())
            process.stdin.flush()
            server.wait_until(
                lambda: f"removed {raylet}" in server.log, timeout_s=60, message="the node is there still"
            )

        yield server, remove


@contextmanager
def _serving(
    folder: Path, command: list[str], args: dict[str, Any], deployments: Sequence[dict[str, Any]]
) -> "Iterator[tuple[Server, subprocess.Popen[bytes]]]":
    port = free_port()
    config = {
        "proxy_location": "HeadOnly",
        "http_options": {"host": "127.0.0.1", "port": port},
        "applications": [
            {
                "name": "test",
                "route_prefix": "/",
                "import_path": "rayserve_sarathi.actors.app:build_app",
                "args": args,
                "deployments": list(deployments),
            }
        ],
    }
    (folder / "app.yaml").write_text(yaml.safe_dump(config))
    # A shell's background job ignores it, and so would the server, which it is to end.
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    with ray_environment() as environment, (folder / "serve.log").open("w") as log:
        process = subprocess.Popen(
            [*command, str(folder / "app.yaml")],
            env=environment,
            stdin=subprocess.PIPE,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
        server = Server(f"http://127.0.0.1:{port}", environment, folder / "serve.log")
        try:
            _wait_until_ready(server, process)
            yield server, process
        finally:
            process.send_signal(signal.SIGINT)
            try:
                process.communicate(timeout=60)
            except subprocess.TimeoutExpired:
                process.kill()
                process.communicate()


def _wait_until_ready(server: Server, process: "subprocess.Popen[bytes]", *, timeout_s: float = 180.0) -> None:
    def is_ready() -> bool:
        assert process.poll() is None, f"serve run ended:\n{server.log[-4000:]}"
        return server.is_ready()

    try:
        server.wait_until(is_ready, timeout_s=timeout_s, message="not ready")
    except AssertionError as error:
        raise AssertionError(f"{error}\n{server.log[-4000:]}") from None
