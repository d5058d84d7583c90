"""Pipelines that come and go under load."""

import asyncio
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import openai
import pytest

from tests.actors.clients import PROMPTS, stream
from tests.actors.cluster import Server, serve_run

pytestmark = pytest.mark.ray

AUTOSCALING = {
    "name": "SchedulerActor",
    "autoscaling_config": {
        "min_replicas": 0,
        "initial_replicas": 1,
        "max_replicas": 3,
        "upscale_delay_s": 1.0,
        "downscale_delay_s": 1.0,
        "downscale_to_zero_delay_s": 6.0,  # the ingress may take some seconds longer to start than the pipeline
        "metrics_interval_s": 0.5,
        "look_back_period_s": 1.5,
        "policy": {"policy_function": "rayserve_sarathi.actors.autoscaling:pipelines_wanted"},
    },
}


async def wait_until(
    server: Server, is_true: Callable[[list[float]], bool], *, timeout_s: float, message: str
) -> float:
    """Wait for a condition of what the pipelines have started; return how long it took."""
    begin_s = time.monotonic()
    while not is_true(started := await asyncio.to_thread(server.metrics, "request_started_total")):
        assert time.monotonic() - begin_s < timeout_s, f"{message} within {timeout_s} s, but {started}"
        await asyncio.sleep(0.2)
    return time.monotonic() - begin_s


class Load:
    """Clients that stream one request after another, and hold every answer against the reference; one never stays."""

    def __init__(self, client: openai.AsyncOpenAI, texts: list[str]) -> None:
        self._client = client
        self._texts = texts
        self.num_answers = 0

    @asynccontextmanager
    async def of(self, num_clients: int) -> AsyncIterator[None]:
        """Keep so many streams open; at the end, let them finish."""
        is_over = asyncio.Event()
        clients = [asyncio.create_task(self._ask(index, is_over)) for index in range(num_clients)]
        clients.append(asyncio.create_task(self._ask_and_leave(is_over)))
        try:
            yield
            is_over.set()
            await asyncio.wait_for(asyncio.gather(*clients), 60)
        finally:
            for task in clients:
                task.cancel()

    async def _ask(self, index: int, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            index = (index + 7) % len(PROMPTS)
            assert await stream(self._client, PROMPTS[index]) == self._texts[index]
            self.num_answers += 1

    async def _ask_and_leave(self, is_over: asyncio.Event) -> None:
        while not is_over.is_set():
            chunks = await self._client.completions.create(
                model="tiny", prompt=[1, 2, 3], max_tokens=250, stream=True, extra_body={"ignore_eos": True}
            )
            async with chunks:
                for _ in range(3):
                    await anext(chunks)


async def test_pipelines_come_and_go_under_load_without_a_failed_request(
    checkpoint: Path, greedy_texts: list[str], tmp_path: Path
):
    args = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "transport": "inline",
        "max_model_len": 256,
        "attention_backend": "torch",  # slower than these clients are, so that their requests wait for it
        "scheduler": {"token_budget": 16, "max_num_seqs": 8},
    }
    with serve_run(tmp_path, args, deployments=[AUTOSCALING]) as server:

        async def reach(num_pipelines: int, timeout_s: float) -> None:
            took_s = await wait_until(
                server,
                lambda started: len(started) == num_pipelines,
                timeout_s=timeout_s,
                message=f"not {num_pipelines} pipelines",
            )
            sys.stderr.write(f"{num_pipelines} pipelines after {took_s:.1f} s, {load.num_answers} answers so far\n")

        async with openai.AsyncOpenAI(
            base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120
        ) as client:
            load = Load(client, greedy_texts)
            async with load.of(3):
                await reach(1, 20)
                async with load.of(25):
                    await reach(3, 60)
                    await wait_until(server, lambda started: min(started) > 0, timeout_s=20, message="one is idle")
                await reach(1, 40)
            await reach(0, 30)
            assert server.is_ready()
            assert server.get("/metrics")[0] == 200

            begin_s = time.monotonic()
            assert await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS[:4])) == greedy_texts[:4]
            sys.stderr.write(f"from zero, the first answers took {time.monotonic() - begin_s:.1f} s\n")
            assert len(server.metrics("request_started_total")) == 1
        assert load.num_answers >= 28
        assert "could not cancel" not in server.log
