"""Two scheduler replicas behind one ingress."""

import asyncio
import os
import signal
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest

from tests.actors.clients import PROMPTS, complete, stream, streams_through
from tests.actors.cluster import SCHEDULER, Server, serve_run

pytestmark = pytest.mark.ray


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "transport": "inline",
        "max_model_len": 256,
        "block_size": 8,
    }
    replicas = [{"name": "SchedulerActor", "num_replicas": 2}]
    with serve_run(tmp_path_factory.mktemp("serve"), args, deployments=replicas) as running:
        running.wait_until(
            lambda: len(running.metrics("request_started_total")) == 2,
            timeout_s=60,
            message="there are not two pipelines",
        )
        yield running


def new_requests(server: Server, before: list[float]) -> list[float]:
    """Return how many requests each pipeline has had since then."""
    after = server.metrics("request_started_total")
    return [now - then for now, then in zip(after, before, strict=True)]


async def test_requests_with_one_prefix_meet_and_others_spread(server: Server, client: openai.AsyncOpenAI):
    started, hits = server.metrics("request_started_total"), server.metric("prefix_cache_hits_total")
    for prefix in range(4):
        for question in range(5):
            await complete(client, [10 + prefix] * 160 + [20 + question] * 8)

    # How many prefixes each gets depends on reports: a request that was open in one counts until the next.
    assert sorted(new_requests(server, started)) in ([5, 15], [10, 10])
    assert server.metric("prefix_cache_hits_total") - hits == 4 * 4 * 160


async def test_they_share_the_requests(server: Server, client: openai.AsyncOpenAI, greedy_texts: list[str]):
    started = server.metrics("request_started_total")
    answers = []
    for first in range(0, len(PROMPTS), 4):
        answers += await asyncio.gather(*(stream(client, prompt) for prompt in PROMPTS[first : first + 4]))
    shares = new_requests(server, started)

    assert answers == greedy_texts
    assert sum(shares) == len(PROMPTS)
    assert min(shares) > 0


async def test_one_takes_over_from_the_other(server: Server, client: openai.AsyncOpenAI, long_texts: list[str]):
    first, _ = server.pids(SCHEDULER)

    assert await streams_through(client, lambda: os.kill(first, signal.SIGKILL)) == long_texts
