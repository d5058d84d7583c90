"""A tokenizer, a model card, and an API around a scripted engine."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import pytest
from fastapi import FastAPI

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.server import build_service_app
from rayserve_sarathi.openai.service import OpenAIService
from rayserve_sarathi.text.tokenizer import Tokenizer
from tests.openai.scripted_engine import ScriptedEngine
from tests.tokenizers_for_tests import byte_level_tokenizer

NOW_S = 1_700_000_000


@dataclass(frozen=True)
class Api:
    """An API and what is behind it."""

    engine: ScriptedEngine
    tokenizer: Tokenizer
    model: ModelCard
    config: IngressConfig
    service: OpenAIService

    @cached_property
    def app(self) -> FastAPI:
        return build_service_app(self.service, self.config)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return Tokenizer(byte_level_tokenizer())


@pytest.fixture
def make_api(tokenizer: Tokenizer) -> Callable[..., Api]:
    """Build an API whose engine answers with `text` (and then ends it, if it `ends`)."""

    def make(
        text: str = "one, two, three", *, config: IngressConfig | None = None, max_model_len: int = 64, **script: Any
    ) -> Api:
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        if script.get("ends"):
            token_ids.append(tokenizer.encode("</s>", add_special_tokens=False)[0])
        engine = ScriptedEngine(token_ids, **script)
        model = ModelCard(
            name="tiny",
            root="/models/tiny",
            max_model_len=max_model_len,
            vocab_size=tokenizer.vocab_size,
            created=NOW_S,
            eos_token_ids=frozenset({1}),
        )
        config = config or IngressConfig()
        service = OpenAIService(engine, tokenizer, model, config, clock=lambda: float(NOW_S))
        return Api(engine, tokenizer, model, config, service)

    return make
