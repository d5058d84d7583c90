"""A checkpoint to serve, and what it says."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.actors.clients import LONG_TOKENS, MAX_TOKENS, PROMPTS
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


def generate(checkpoint: Path, num_tokens: int) -> list[str]:
    """Return the greedy text after each prompt."""
    reference, tokenizer = Reference(checkpoint), AutoTokenizer.from_pretrained(checkpoint)
    outputs = [reference.generate(prompt, num_tokens) for prompt in PROMPTS]
    return [tokenizer.decode(output, skip_special_tokens=True) for output in outputs]
