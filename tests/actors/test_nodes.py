"""Two stages of two ranks each, spread over the nodes of a cluster; a node is lost under load."""

import asyncio
import re
import sys
from pathlib import Path

import openai
import pytest

from tests.actors.clients import PROMPTS, complete, streams_through
from tests.actors.cluster import serve_on_nodes

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
    "scheduler": {"token_budget": 64, "max_num_waiting": 400},
}


async def test_a_lost_node_costs_a_pause_and_no_stream(
    checkpoint: Path, greedy_texts: list[str], long_texts: list[str], tmp_path: Path
):
    with serve_on_nodes(tmp_path, {"model": str(checkpoint), **ARGS}) as (server, remove):
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = await asyncio.gather(*(complete(client, prompt) for prompt in PROMPTS[:8]))
            # Two of three nodes have a stage; the third is where a lost one moves to.
            without_scheduler = server.raylets("ray::StageActor") - server.raylets(
                "ray::ServeReplica:test:SchedulerActor"
            )
            texts = await streams_through(client, lambda: remove(min(without_scheduler)))
            more = await streams_through(client, lambda: None)
        log = server.log

    assert answers == greedy_texts[:8]
    assert texts == long_texts
    assert more == long_texts
    pauses = re.findall(r"the pipeline is back after ([0-9.]+) s", log)
    assert pauses
    for pause in pauses:
        sys.stderr.write(f"node lost: back after {pause} s\n")
