"""A real `serve run` with two pipeline stages, and real clients."""

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from rayserve_sarathi import cli
from tests.actors.clients import MAX_TOKENS, PROMPTS, complete, stream
from tests.actors.cluster import Server, serve_run

pytestmark = pytest.mark.ray

NUM_BLOCKS = 64
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "pipeline_parallel_size": 2,
        "max_model_len": 256,
        "block_size": 8,
        "num_gpu_blocks_override": NUM_BLOCKS,  # 512 tokens for 32 requests of up to 89: they preempt each other
        "scheduler": {"token_budget": 48, "max_num_waiting": 400},
        "slo": {"tbt_s": 0.2},
        "ingress": {"admin_keys": ["admin"]},
    }
    with serve_run(tmp_path_factory.mktemp("serve"), args) as running:
        yield running


async def test_one_client_gets_the_greedy_text_of_transformers(client: openai.AsyncOpenAI, greedy_texts: list[str]):
    assert await complete(client, PROMPTS[7]) == greedy_texts[7]
    assert await stream(client, PROMPTS[9]) == greedy_texts[9]


async def test_32_at_once_get_the_same_in_spite_of_preemption(
    server: Server, client: openai.AsyncOpenAI, greedy_texts: list[str]
):
    whole = await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS))
    streamed = await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS))

    assert whole == greedy_texts
    assert streamed == greedy_texts
    assert server.metric("num_preemptions_total") > 0
    assert server.metric("kv_cache_usage_perc") == 0


def test_curl_gets_the_same(server: Server, greedy_texts: list[str]):
    body = json.dumps({"model": "tiny", "prompt": PROMPTS[3], "max_tokens": MAX_TOKENS, "temperature": 0})
    command = ["curl", "-sS", f"{server.url}/v1/completions", "-H", "Content-Type: application/json", "-d", body]
    answer = json.loads(subprocess.run(command, capture_output=True, check=True, timeout=60).stdout)

    assert answer["choices"][0]["text"] == greedy_texts[3]


async def test_an_answer_carries_the_request_id_of_its_client_once(server: Server):
    async with httpx2.AsyncClient() as client:
        answer = await client.get(f"{server.url}/v1/models", headers={"x-request-id": "mine-1"})
        other = await client.get(f"{server.url}/nothing")

    assert answer.headers.get_list("x-request-id") == ["mine-1"]
    assert len(other.headers.get_list("x-request-id")) == 1
    assert other.json()["error"]["type"] == "invalid_request_error"


def test_a_ray_handle_gets_the_same_by_the_example_of_the_readme(
    server: Server, greedy_texts: list[str], tmp_path: Path
):
    (example,) = [block for block in re.findall(r"```python\n(.*?)```", README.read_text(), re.S) if "handle" in block]
    body = {"model": "tiny", "prompt": PROMPTS[5], "max_tokens": MAX_TOKENS, "temperature": 0}
    example = re.sub(r"^body = .*$", f"body = {body!r}", example, count=1, flags=re.M)
    example = example.replace('get_app_handle("tiny")', 'get_app_handle("test")')
    (tmp_path / "example.py").write_text(example)
    result = subprocess.run(
        [sys.executable, str(tmp_path / "example.py")],
        env=server.client_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert result.returncode == 0, result.stderr
    whole, _, streamed = result.stdout.partition("\n---\n")
    assert whole == greedy_texts[5]
    assert streamed.rstrip("\n") == greedy_texts[5].rstrip("\n")


async def test_a_pipeline_reports_which_calls_are_in_its_report(
    server: Server, client: openai.AsyncOpenAI, tmp_path: Path
):
    (tmp_path / "calls.py").write_text(
        """
import ray
from ray import serve

ray.init(namespace="serve")
scheduler = serve.get_deployment_handle("SchedulerActor", "test")
[report] = scheduler.broadcast("record_routing_stats").results(timeout_s=30)
print(max(report["last_calls"].values()))
"""
    )

    async def last_call() -> int:
        process = await asyncio.create_subprocess_exec(
            sys.executable, str(tmp_path / "calls.py"), env=server.client_environment, stdout=subprocess.PIPE
        )
        output, _ = await asyncio.wait_for(process.communicate(), 120)
        return int(output)

    await complete(client, PROMPTS[0])
    before = await last_call()
    for prompt in PROMPTS[:3]:
        await complete(client, prompt)

    assert await last_call() == before + 3


def test_a_call_to_a_pipeline_that_is_gone_fails_and_holds_up_no_other(server: Server, tmp_path: Path):
    (tmp_path / "calls.py").write_text(
        """
import ray
from ray import serve
from ray.serve.exceptions import RayServeException

ray.init(namespace="serve")
scheduler = serve.get_deployment_handle("SchedulerActor", "test")
assert scheduler.find_overload.remote(1).result(timeout_s=30) is None
try:
    scheduler.cancel.remote([], pipeline="gone").result(timeout_s=30)
except RayServeException as error:
    print(error)
assert scheduler.find_overload.remote(1).result(timeout_s=30) is None
"""
    )
    result = subprocess.run(
        [sys.executable, str(tmp_path / "calls.py")],
        env=server.client_environment,
        capture_output=True,
        text=True,
        timeout=120,
    )

    assert result.returncode == 0, result.stderr
    assert result.stdout == "pipeline gone is gone\n"


async def test_200_streams_closed_at_once_leave_nothing_behind(server: Server):
    async def open_stream(index: int) -> asyncio.StreamWriter:
        body = {"model": "tiny", "prompt": [index] * 20, "max_tokens": 200, "stream": True, "ignore_eos": True}
        payload = json.dumps(body).encode()
        _, writer = await asyncio.open_connection("127.0.0.1", int(server.url.rsplit(":", 1)[1]))
        writer.write(
            b"POST /v1/completions HTTP/1.1\r\nHost: test\r\nContent-Type: application/json\r\n"
            b"Content-Length: %d\r\n\r\n%s" % (len(payload), payload)
        )
        await writer.drain()
        return writer

    def num_open() -> float:
        return server.metric("num_requests_running") + server.metric("num_requests_waiting")

    writers = await asyncio.gather(*map(open_stream, range(200)))
    await asyncio.to_thread(server.wait_until, lambda: num_open() >= 150, timeout_s=60, message="not all are open")
    for writer in writers:
        writer.transport.abort()
    await asyncio.to_thread(
        server.wait_until,
        lambda: num_open() == 0 and server.metric("kv_cache_usage_perc") == 0,
        timeout_s=10,
        message="requests or blocks are left",
    )


def test_a_client_that_reads_slowly_is_told_apart(server: Server, capsys: pytest.CaptureFixture[str]):
    # 15 MB of log-probabilities: the sockets on the way take half of it.
    prompts = [[7 + index] * 240 for index in range(100)]
    body = {"model": "tiny", "prompt": prompts, "max_tokens": 4, "ignore_eos": True, "echo": True, "logprobs": 20}

    def is_told() -> bool:
        # Until HAProxy knows the ingress, Serve's own proxy is between them, which reads everything.
        answer_id = read_slowly(server, {**body, "stream": True})
        time.sleep(0.5)  # the ingress tells the scheduler in a call of its own, for which there is nothing to wait
        assert cli.main(["why", answer_id, "--url", server.url, "--key", "admin"]) == 0
        return "slow_reader: it was there in time" in capsys.readouterr().out

    server.wait_until(is_told, timeout_s=90, message="nobody was slow")
    _, metrics = server.get("/metrics")
    assert re.search(r'tbt_slo_violations_total\{.*cause="slow_reader".*\} [1-9]', metrics)


def read_slowly(server: Server, body: dict[str, object]) -> str:
    """Read a stream only once all of it is computed, and for longer than the target; return its id."""
    with httpx2.stream("POST", f"{server.url}/v1/completions", json=body, timeout=60) as answer:
        lines = answer.iter_lines()
        first = next(lines)
        server.wait_until(
            lambda: server.metric("num_requests_running") + server.metric("num_requests_waiting") == 0,
            timeout_s=60,
            message="it is not computed",
        )
        time.sleep(0.3)  # more than the target: to be slow is what is tested
        assert list(lines)[-2] == "data: [DONE]"
    return str(json.loads(first.removeprefix("data: "))["id"])


async def test_a_client_that_leaves_before_its_whole_answer_frees_its_blocks(
    server: Server, client: openai.AsyncOpenAI
):
    asking = asyncio.create_task(
        client.completions.create(model="tiny", prompt=[1, 2, 3], max_tokens=250, extra_body={"ignore_eos": True})
    )
    await asyncio.to_thread(
        server.wait_until, lambda: server.metric("num_requests_running") == 1, timeout_s=10, message="not running"
    )
    asking.cancel()
    await asyncio.to_thread(
        server.wait_until, lambda: server.metric("kv_cache_usage_perc") == 0, timeout_s=1, message="blocks are held"
    )


def test_the_start_tells_how_long_each_phase_took(server: Server):
    for phase in ("model description", "stages with weights and KV cache", "warm-up", "ready after"):
        assert re.search(rf"{phase}.* \d+\.\d s", server.log), f"{phase} is not in the log"


async def test_an_admin_gets_every_step_of_each_stage(server: Server, client: openai.AsyncOpenAI, tmp_path: Path):
    await complete(client, PROMPTS[1])
    output = tmp_path / "trace.json"
    status = await asyncio.to_thread(
        cli.main, ["trace", "--url", server.url, "--key", "admin", "--output", str(output)]
    )
    assert status == 0
    events = json.loads(output.read_text())["traceEvents"]

    tracks = [event["tid"] for event in events if event["ph"] == "X" and event["name"] != "unpack"]
    assert tracks.count(1) == tracks.count(2) >= MAX_TOKENS
    assert server.get("/debug/trace")[0] == 401
    assert server.metric("step_time_seconds_total") > 0


def test_models_name_the_checkpoint(server: Server, checkpoint: Path):
    status, body = server.get("/v1/models")
    (model,) = json.loads(body)["data"]

    assert status == 200
    assert (model["id"], model["root"], model["max_model_len"]) == ("tiny", str(checkpoint), 256)
