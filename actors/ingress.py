"""The actor that clients talk to: HTTP, and the same calls through Ray handles."""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncGenerator, Mapping
from typing import Any

from fastapi import FastAPI
from ray import serve
from ray.serve.handle import DeploymentHandle
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from rayserve_sarathi.actors.logs import log_to_stderr
from rayserve_sarathi.actors.placement_watch import PlacementWatch
from rayserve_sarathi.actors.remote_engine import RemoteEngine
from rayserve_sarathi.config import AppConfig
from rayserve_sarathi.models.resolve import find_tokenizer, resolve_model
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.server import build_service_app
from rayserve_sarathi.openai.service import OpenAIService
from rayserve_sarathi.text.tokenizer import load_tokenizer

logger = logging.getLogger(__name__)

JsonObject = dict[str, object]


class OpenAIIngress:
    """Text in, text out; tokens go to and come from the scheduler.

    Other Ray applications call its methods through `serve.get_app_handle(name)`; HTTP has the same and more.

    Args:
        config: The application's.
        scheduler: Handle of the scheduler deployment.
    """

    async def __init__(self, config: AppConfig, scheduler: DeploymentHandle[Any]) -> None:  # type: ignore[misc]  # Serve awaits it
        log_to_stderr()
        begin_s = time.monotonic()
        info = resolve_model(config)
        tokenizer = load_tokenizer(
            find_tokenizer(config, info),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            chat_template=config.chat_template,
        )
        self._placement = PlacementWatch(serve.get_replica_context().app_name, config)
        self._watching = asyncio.create_task(self._placement.run())
        self._engine = RemoteEngine(
            scheduler,
            self._placement,
            ingress=serve.get_replica_context().replica_id.unique_id,
            max_num_waiting=config.scheduler.max_num_waiting,
            block_size=config.block_size if config.enable_prefix_caching else None,
            pipeline_timeout_s=config.ingress.pipeline_timeout_s,
            tbt_s=config.slo.tbt_s,
        )
        card = ModelCard(
            name=config.model_name,
            root=str(info.root) if config.model == "sarathi-tiny" else config.model,
            max_model_len=info.max_model_len,
            vocab_size=info.vocab_size,
            created=int(time.time()),
            eos_token_ids=frozenset(info.eos_token_ids),
        )
        self._service = OpenAIService(self._engine, tokenizer, card, config.ingress, seed=config.seed)
        self._config = config.ingress
        gc.collect()
        gc.freeze()  # else each collection visits all modules: parsing 4 MB of JSON then takes seconds of every stream
        logger.info("ingress ready after %.1f s", time.monotonic() - begin_s)

    async def __serve_build_asgi_app__(self) -> FastAPI:
        """Serve calls this once the object is made."""
        app = build_service_app(self._service, self._config)
        app.add_middleware(_WithoutRequestId)
        return app

    async def check_health(self) -> None:
        """Serve asks this: a replica that raises is replaced."""
        self._engine.check_health()

    async def completions(self, body: Mapping[str, object]) -> JsonObject:
        """Return the answer to a body of `/v1/completions`."""
        return await self._service.completions(body)

    async def stream_completions(self, body: Mapping[str, object]) -> AsyncGenerator[JsonObject]:
        """Yield the chunks of the answer to a body of `/v1/completions`."""
        async for chunk in self._service.stream_completions(body):
            yield chunk

    async def chat_completions(self, body: Mapping[str, object]) -> JsonObject:
        """Return the answer to a body of `/v1/chat/completions`."""
        return await self._service.chat_completions(body)

    async def stream_chat_completions(self, body: Mapping[str, object]) -> AsyncGenerator[JsonObject]:
        """Yield the chunks of the answer to a body of `/v1/chat/completions`."""
        async for chunk in self._service.stream_chat_completions(body):
            yield chunk


class _WithoutRequestId:
    """Takes `x-request-id` off each answer, as Serve's proxy appends it too and a client would see it twice."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_without(message: Message) -> None:
            if message["type"] == "http.response.start":
                del MutableHeaders(scope=message)["x-request-id"]
            await send(message)

        await self._app(scope, receive, send_without)
