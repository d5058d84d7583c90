"""A pipeline that has failed more often than it may: its requests hear of it, and Serve puts another in its place."""

import asyncio
import os
import re
import signal
from pathlib import Path

import openai
import pytest

from tests.actors.clients import PROMPTS, complete
from tests.actors.cluster import SCHEDULER, serve_run

pytestmark = pytest.mark.ray


async def test_a_pipeline_that_is_given_up_says_so_and_is_replaced(
    checkpoint: Path, greedy_texts: list[str], tmp_path: Path
):
    args = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "pipeline_parallel_size": 2,
        "max_model_len": 512,
        "max_rebuilds": 0,
    }
    with serve_run(tmp_path, args) as server:
        before = server.pids(SCHEDULER)
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
            long = {"model": "tiny", "prompt": PROMPTS[0], "max_tokens": 480, "extra_body": {"ignore_eos": True}}
            streamed = await client.completions.create(**long, stream=True)  # type: ignore[call-overload]
            whole = asyncio.ensure_future(client.completions.create(**long))  # type: ignore[call-overload]
            await anext(streamed)
            await asyncio.to_thread(
                server.wait_until,
                lambda: server.metric("num_requests_running") == 2,
                timeout_s=30,
                message="the requests did not run",
            )
            os.kill(server.pids("ray::StageActor")[1], signal.SIGKILL)

            with pytest.raises(openai.APIError, match=r"the pipeline is given up: stage \d is dead"):
                async for _ in streamed:
                    pass
            with pytest.raises(
                openai.InternalServerError, match=r"the pipeline is given up: stage \d is dead"
            ) as refused:
                await whole
            assert refused.value.status_code == 503
            assert await asyncio.to_thread(server.is_ready) is False
            await asyncio.to_thread(
                server.wait_until,
                lambda: server.pids(SCHEDULER) not in ([], before) and server.is_ready(),
                timeout_s=120,
                message="no other pipeline came",
            )
            assert await complete(client, PROMPTS[1]) == greedy_texts[1]
        # Serve asks every few seconds, and finds a replica that fails its check or has ended since.
        assert re.search(r"Health check for Replica.* failed|Actor for Replica.* crashed", server.log)
        assert "this replica ends: the pipeline is given up" in server.log
