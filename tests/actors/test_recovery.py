"""Stages and schedulers that die or stop under load: streams pause, and go on with the tokens they would have had."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import openai
import pytest

from tests.actors.clients import streams_through
from tests.actors.cluster import Server, serve_run

pytestmark = pytest.mark.ray

ARGS = {
    "served_model_name": "tiny",
    "pipeline_parallel_size": 2,
    "max_model_len": 256,
    "block_size": 8,
    "num_gpu_blocks_override": 128,
    "heartbeat_timeout_s": 5.0,
    "max_rebuilds": 50,
    "scheduler": {"token_budget": 64, "max_num_waiting": 400},
}


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    with serve_run(tmp_path_factory.mktemp("serve"), {"model": str(checkpoint), **ARGS}) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


def kill(server: Server, title: str, *indices: int, how: signal.Signals = signal.SIGKILL) -> None:
    pids = server.pids(title)
    for index in indices:
        os.kill(pids[index], how)


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1)], ids=["first", "last", "both"])
async def test_killed_stages_cost_a_pause_and_no_stream(
    server: Server, client: openai.AsyncOpenAI, long_texts: list[str], stages: tuple[int, ...]
):
    texts = await streams_through(client, lambda: kill(server, "ray::StageActor", *stages))

    assert texts == long_texts
    assert server.metric("kv_cache_usage_perc") == 0
    (*_, pause) = re.findall(r"the pipeline is back after ([0-9.]+) s", server.log)
    sys.stderr.write(f"stages {stages} killed: back after {pause} s\n")


async def test_a_stage_that_stops_is_replaced(server: Server, client: openai.AsyncOpenAI, long_texts: list[str]):
    texts = await streams_through(client, lambda: kill(server, "ray::StageActor", 1, how=signal.SIGSTOP))

    assert texts == long_texts
    assert 'reason="hung"' in server.get("/metrics")[1]


async def test_a_death_during_recovery_is_recovered_from(
    server: Server, client: openai.AsyncOpenAI, long_texts: list[str]
):
    num_rebuilds = server.log.count("rebuilding it")

    def kill_twice() -> None:
        kill(server, "ray::StageActor", 0)
        server.wait_until(
            lambda: server.log.count("rebuilding it") > num_rebuilds, timeout_s=30, message="no recovery began"
        )
        kill(server, "ray::StageActor", 0)

    assert await streams_through(client, kill_twice) == long_texts


async def test_a_killed_scheduler_costs_a_pause_and_no_stream(
    server: Server, client: openai.AsyncOpenAI, long_texts: list[str]
):
    texts = await streams_through(client, lambda: kill(server, "ray::ServeReplica:test:SchedulerActor", 0))

    assert texts == long_texts
    await asyncio.to_thread(server.wait_until, server.is_ready, timeout_s=60, message="not ready again")
