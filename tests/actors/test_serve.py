"""A real `serve run` with two pipeline stages, and real clients."""

import asyncio
import json
import re
import subprocess
import sys
from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import httpx
import openai
import pytest

from tests.actors.cluster import Server, serve_run
from tests.servable import Reference, save_servable

pytestmark = pytest.mark.ray

MAX_TOKENS = 24
PROMPTS = [[index % 90 + 5] * (5 * index % 31 + 1) + list(range(index, 2 * index + 3)) for index in range(32)]
README = Path(__file__).resolve().parents[2] / "README.md"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("servable"))


@pytest.fixture(scope="module")
def references(checkpoint: Path) -> list[list[int]]:
    reference = Reference(checkpoint)
    return [reference.generate(prompt, MAX_TOKENS) for prompt in PROMPTS]


@pytest.fixture(scope="module")
def server(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    args = {
        "model": str(checkpoint),
        "served_model_name": "tiny",
        "pipeline_parallel_size": 2,
        "max_model_len": 256,
        "block_size": 8,
        "num_gpu_blocks_override": 64,  # 512 tokens for 32 requests of up to 90: they preempt each other
        "scheduler": {"token_budget": 48, "max_num_waiting": 400},
    }
    with serve_run(tmp_path_factory.mktemp("serve"), args) as running:
        yield running


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as opened:
        yield opened


async def complete(client: openai.AsyncOpenAI, prompt: list[int], *, has_stream: bool) -> list[int]:
    """Return the ids of the greedy tokens, read back from the logprobs that `return_tokens_as_token_ids` names."""
    text = ""
    if has_stream:
        stream = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
        )
        async for chunk in stream:
            text += chunk.choices[0].text
    else:
        answer = await client.completions.create(model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
        text = answer.choices[0].text
    return text


def texts(checkpoint: Path, references: list[list[int]]) -> list[str]:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    return [tokenizer.decode(token_ids, skip_special_tokens=True) for token_ids in references]


@pytest.mark.parametrize("has_stream", [True, False], ids=["streaming", "whole"])
async def test_32_at_once_get_the_greedy_text_of_transformers_in_spite_of_preemption(
    server: Server, client: openai.AsyncOpenAI, checkpoint: Path, references: list[list[int]], has_stream: bool
):
    answers = await asyncio.gather(*(complete(client, prompt, has_stream=has_stream) for prompt in PROMPTS))

    assert list(answers) == texts(checkpoint, references)
    assert server.metric("num_preemptions_total") > 0
    assert server.metric("num_requests_running") == 0
