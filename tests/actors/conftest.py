"""A checkpoint to serve, what it says, and a client of the server that a module has started."""

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest
from transformers import AutoTokenizer

from tests.actors.clients import LONG_TOKENS, MAX_TOKENS, PROMPTS
from tests.actors.cluster import Server
from tests.servable import Reference, save_servable


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("servable"))


@pytest.fixture(scope="session")
def greedy_texts(checkpoint: Path) -> list[str]:
    """What `transformers.generate` continues each prompt with."""
    return generate(checkpoint, MAX_TOKENS)


@pytest.fixture(scope="session")
def long_texts(checkpoint: Path) -> list[str]:
    """The same, for longer."""
    return generate(checkpoint, LONG_TOKENS)


@pytest.fixture
async def client(server: Server) -> AsyncIterator[openai.AsyncOpenAI]:
    async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=120) as opened:
        yield opened


def generate(checkpoint: Path, num_tokens: int) -> list[str]:
    """Return the greedy text after each prompt."""
    reference, tokenizer = Reference(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    outputs = [reference.generate(prompt, num_tokens) for prompt in PROMPTS]
    return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]
