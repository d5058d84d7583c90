"""Stages and schedulers that die or stop under load: streams pause, and go on with the tokens they would have had."""

import asyncio
import os
import re
import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.actors.clients import streams_through
from tests.actors.cluster import SCHEDULER, Server, serve_run

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


def kill(server: Server, *stages: int, how: signal.Signals = signal.SIGKILL) -> None:
    for pid in [server.stage_pid(stage) for stage in stages]:
        os.kill(pid, how)


def faults(server: Server) -> list[str]:
    """Return why the pipeline was rebuilt, each time."""
    return re.findall(r"the pipeline failed \((.*)\); rebuilding it", server.log)


def pauses(server: Server) -> list[str]:
    """Return how many seconds each recovery took."""
    return re.findall(r"the pipeline is back after ([0-9.]+) s", server.log)


@pytest.mark.parametrize("stages", [(0,), (1,), (0, 1)], ids=["first", "last", "both"])
async def test_killed_stages_cost_a_pause_and_no_stream(
    server: Server, client: openai.AsyncOpenAI, long_texts: list[str], stages: tuple[int, ...]
):
    num_faults, num_pauses = len(faults(server)), len(pauses(server))
    texts = await streams_through(client, lambda: kill(server, *stages))

    assert texts == long_texts
    assert server.metric("kv_cache_usage_perc") == 0
    # Of two that die together, the second may be noticed later.
    assert re.search("|".join(f"stage {stage} is dead" for stage in stages), " ".join(faults(server)[num_faults:]))
    recent = pauses(server)[num_pauses:]
    assert recent
    sys.stderr.write(f"stages {stages} killed: back after {', '.join(recent)} s\n")


async def test_a_stage_that_stops_is_replaced(server: Server, client: openai.AsyncOpenAI, long_texts: list[str]):
    num_faults = len(faults(server))
    texts = await streams_through(client, lambda: kill(server, 1, how=signal.SIGSTOP))

    assert texts == long_texts
    assert any("stage 1 does not answer" in fault for fault in faults(server)[num_faults:])
    assert 'reason="hung"' in server.get("/metrics")[1]
    sys.stderr.write(f"stage 1 stopped: back after {pauses(server)[-1]} s\n")


async def test_a_death_during_recovery_is_recovered_from(
    server: Server, client: openai.AsyncOpenAI, long_texts: list[str]
):
    num_faults, num_pauses = len(faults(server)), len(pauses(server))

    def kill_twice() -> None:
        kill(server, 0)
        server.wait_until(lambda: len(faults(server)) > num_faults, timeout_s=30, message="no recovery began")
        kill(server, 1)

    assert await streams_through(client, kill_twice) == long_texts
    assert len(faults(server)) - num_faults == 2
    sys.stderr.write(f"stage 1 killed while stage 0 came back: back after {', '.join(pauses(server)[num_pauses:])} s\n")


async def test_a_killed_scheduler_costs_a_pause_and_no_stream(
    server: Server, client: openai.AsyncOpenAI, long_texts: list[str]
):
    (scheduler,) = server.pids(SCHEDULER)
    texts = await streams_through(client, lambda: os.kill(scheduler, signal.SIGKILL))

    assert texts == long_texts
    assert server.pids(SCHEDULER) != [scheduler]
    await asyncio.to_thread(server.wait_until, server.is_ready, timeout_s=60, message="not ready again")
