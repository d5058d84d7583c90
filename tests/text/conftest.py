"""Tokenizers for the tests of this folder."""

import pytest

from rayserve_sarathi.text.tokenizer import Tokenizer
from tests.tokenizers_for_tests import byte_fallback_tokenizer, byte_level_tokenizer, metaspace_tokenizer

FAMILIES = {
    "byte_level": byte_level_tokenizer,
    "byte_fallback": byte_fallback_tokenizer,
    "metaspace": metaspace_tokenizer,
}


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer())


@pytest.fixture(scope="session", params=sorted(FAMILIES))
def any_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    return Tokenizer(FAMILIES[request.param]())


@pytest.fixture(scope="session", params=["byte_fallback", "byte_level"])
def byte_tokenizer(request: pytest.FixtureRequest) -> Tokenizer:
    """Tokenizers that split a character they do not know into its bytes."""
    return Tokenizer(FAMILIES[request.param]())
