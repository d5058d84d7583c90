"""The tiny model behind HTTP, without Ray: scheduler, pipeline and API in this process."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from rayserve_sarathi.config import EngineConfig, IngressConfig, parse
from rayserve_sarathi.engine import make_scheduler
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.local_engine import LocalEngine
from rayserve_sarathi.models.resolve import find_tokenizer, resolve_model
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.server import build_app
from rayserve_sarathi.text.tokenizer import load_tokenizer
from tests.served import served

MODEL = "sarathi-tiny"


@asynccontextmanager
async def engine_server(**settings: Any) -> AsyncIterator[str]:
    """Serve; yield the URL.

    Args:
        settings: Fields of `EngineConfig`.
    """
    config = parse(
        EngineConfig,
        {"model": MODEL, "transport": "inline", "device": "cpu", "max_model_len": 512, "num_gpu_blocks_override": 256}
        | settings,
    )
    info = resolve_model(config)
    tokenizer = load_tokenizer(find_tokenizer(config, info))
    pipeline, num_blocks = make_inline_pipeline(config)
    scheduler = make_scheduler(config, info, num_blocks=num_blocks)
    card = ModelCard(
        name=config.model_name,
        root=config.model,
        max_model_len=info.max_model_len,
        vocab_size=info.vocab_size,
        created=0,
        eos_token_ids=frozenset(info.eos_token_ids),
    )
    engine = LocalEngine(scheduler, pipeline, eos_token_ids=info.eos_token_ids, model_name=config.model_name)
    async with engine, served(build_app(engine, tokenizer, card, IngressConfig())) as url:
        yield url
