"""Two stages of two ranks each, spread over the nodes of a cluster; ranks, the scheduler and a node die under load."""

import asyncio
import os
import re
import signal
import sys
from pathlib import Path

import openai
import pytest

from tests.actors.clients import PROMPTS, complete, streams_through
from tests.actors.cluster import SCHEDULER, serve_on_nodes

pytestmark = pytest.mark.ray

ARGS = {
    "served_model_name": "tiny",
    "tensor_parallel_size": 2,
    "pipeline_parallel_size": 2,
    "num_cpus_per_rank": 1,
    "max_model_len": 256,
    "block_size": 8,
    "num_gpu_blocks_override": 256,
    "heartbeat_timeout_s": 5.0,
    "max_rebuilds": 20,
    "scheduler": {"token_budget": 64, "max_num_waiting": 400},
}


async def test_ranks_schedulers_and_nodes_that_die_cost_a_pause_and_no_stream(
    checkpoint: Path, greedy_texts: list[str], long_texts: list[str], tmp_path: Path
):
    with serve_on_nodes(tmp_path, {"model": str(checkpoint), **ARGS}) as (server, remove):

        def kill_rank() -> None:
            os.kill(server.stage_pid(0, tp_rank=1), signal.SIGKILL)

        def kill_scheduler() -> None:
            os.kill(server.pids(SCHEDULER)[0], signal.SIGKILL)

        def remove_node() -> None:
            # Two of three nodes have a stage; the third is where a lost one moves to.
            without_scheduler = server.raylets("ray::StageActor") - server.raylets(SCHEDULER)
            remove(min(without_scheduler))

        faults = {
            "a rank": kill_rank,
            "the scheduler": kill_scheduler,
            "a node with a stage": remove_node,
        }
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            assert await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS[:8])) == greedy_texts[:8]
            for what, fault in faults.items():
                before = server.log
                assert await streams_through(client, fault) == long_texts, what
                lines = server.log[len(before) :]
                recoveries = re.findall(r"(?:the pipeline is back|actors.scheduler: ready) after [0-9.]+ s", lines)
                assert recoveries, what
                sys.stderr.write(f"{what} lost: {'; '.join(recoveries)}\n")
            assert await streams_through(client, lambda: None) == long_texts
