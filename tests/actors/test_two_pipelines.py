"""Two scheduler replicas behind one ingress."""

import asyncio
import os
import signal
from pathlib import Path

import openai
import pytest

from tests.actors.clients import PROMPTS, stream, streams_through
from tests.actors.cluster import serve_run

pytestmark = pytest.mark.ray

SCHEDULER = "ray::ServeReplica:test:SchedulerActor"


async def test_two_inline_pipelines_share_the_requests_and_one_takes_over_from_the_other(
    checkpoint: Path, greedy_texts: list[str], long_texts: list[str], tmp_path: Path
):
    args = {"model": str(checkpoint), "served_model_name": "tiny", "transport": "inline", "max_model_len": 256}
    replicas = [{"name": "SchedulerActor", "num_replicas": 2}]
    with serve_run(tmp_path, args, deployments=replicas) as server:
        server.wait_until(
            lambda: server.get("/metrics")[1].count("\nsarathi_request_started_total") == 2,
            timeout_s=60,
            message="there are not two pipelines",
        )
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            answers = []
            for first in range(0, len(PROMPTS), 4):
                answers += await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS[first : first + 4]))
            _, metrics = server.get("/metrics")
            first, *_ = server.pids(SCHEDULER)
            through_a_death = await streams_through(client, lambda: os.kill(first, signal.SIGKILL))
    started = [
        float(line.rsplit(" ", 1)[1])
        for line in metrics.splitlines()
        if line.startswith("sarathi_request_started_total")
    ]

    assert answers == greedy_texts
    assert through_a_death == long_texts
    assert sum(started) == len(PROMPTS)
    assert min(started) > 0
