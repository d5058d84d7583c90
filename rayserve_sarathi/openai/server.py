"""The HTTP routes: thin around `OpenAIService`."""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable
from importlib.metadata import version
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.openapi.utils import get_openapi
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema
from starlette.exceptions import HTTPException

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.openai import responses
from rayserve_sarathi.openai.answers import JsonObject
from rayserve_sarathi.openai.engine_client import EngineClient
from rayserve_sarathi.openai.errors import HttpError, describe
from rayserve_sarathi.openai.exchange import (
    EVENT_STREAM,
    EventStream,
    read_deadline,
    read_json_object,
    time_limit,
    until_disconnect,
)
from rayserve_sarathi.openai.fields import IGNORED_FIELDS, OFF_VALUES
from rayserve_sarathi.openai.json_encoder import encode_json
from rayserve_sarathi.openai.middleware import ApiKeyMiddleware, ErrorMiddleware
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)
from rayserve_sarathi.openai.service import OpenAIService
from rayserve_sarathi.scheduling.late_tokens import LateReport
from rayserve_sarathi.text.tokenizer import Tokenizer
from rayserve_sarathi.tracing import render_chrome_trace

_HEALTH_TIMEOUT_S = 10.0
_MANY_BYTES = 10_000
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_TOO_LATE = "the request took longer than it may; see x-request-timeout-seconds"
_TIMEOUT_HEADER = {
    "name": "x-request-timeout-seconds",
    "in": "header",
    "required": False,
    "description": "When to give up.",
    "schema": {"type": "number", "exclusiveMinimum": 0},
}
_ERROR_STATUSES = (400, 401, 404, 408, 413, 415, 429, 500, 503)
_BODIES: tuple[type[BaseModel], ...] = (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
)


def build_app(
    engine: EngineClient, tokenizer: Tokenizer, model: ModelCard, config: IngressConfig, *, seed: int = 0
) -> FastAPI:
    """Return the API of one engine as an ASGI application."""
    return build_service_app(OpenAIService(engine, tokenizer, model, config, seed=seed), config)


def build_service_app(service: OpenAIService, config: IngressConfig) -> FastAPI:
    """Return the API of a service that its owner also uses without HTTP."""
    app = FastAPI(
        title="rayserve_sarathi",
        version=version("rayserve-sarathi"),
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    routes = _Routes(service, config)
    text = (TokenizeTextRequest, TokenizeChatRequest)
    _post(app, "/v1/completions", routes.completions, (CompletionRequest,), responses.CompletionResponse)
    _post(
        app, "/v1/chat/completions", routes.chat_completions, (ChatCompletionRequest,), responses.ChatCompletionResponse
    )
    _post(app, "/tokenize", routes.tokenize, text, responses.TokenizeResponse)
    _post(app, "/detokenize", routes.detokenize, (DetokenizeRequest,), responses.DetokenizeResponse)
    _get(app, "/v1/models", routes.models, responses.ModelListResponse)
    _get(app, "/v1/models/{model_id:path}", routes.model, responses.ModelResponse)
    _get(app, "/tokenizer_info", routes.tokenizer_info, responses.TokenizerInfoResponse)
    _get(app, "/health", routes.health, responses.HealthResponse)
    _get(app, "/health/ready", routes.health, responses.HealthResponse)
    _get(app, "/metrics", routes.metrics, None)
    if config.admin_keys:
        _get(app, "/debug/trace", routes.trace, responses.TraceResponse)
        _get(app, "/debug/why/{request_id}", routes.why, responses.WhyResponse)
    app.add_exception_handler(HTTPException, _answer_routing_error)
    # The last one added is the outermost.
    app.add_middleware(ApiKeyMiddleware, api_keys=config.api_keys, admin_keys=config.admin_keys)
    app.add_middleware(ErrorMiddleware)
    app.openapi = lambda: _openapi(app, config)  # type: ignore[method-assign]  # FastAPI's documented way to change its schema
    return app


class _Routes:
    """One method for each route."""

    def __init__(self, service: OpenAIService, config: IngressConfig) -> None:
        self._service = service
        self._config = config

    async def completions(self, request: Request) -> Response:
        return await self._generate(request, self._service.completions, self._service.stream_completions)

    async def chat_completions(self, request: Request) -> Response:
        return await self._generate(request, self._service.chat_completions, self._service.stream_chat_completions)

    async def tokenize(self, request: Request) -> Response:
        return _json(await self._service.tokenize(await self._read_body(request)))

    async def detokenize(self, request: Request) -> Response:
        return _json(await self._service.detokenize(await self._read_body(request)))

    async def models(self) -> Response:
        return _json(self._service.models())

    async def model(self, model_id: str) -> Response:
        return _json(self._service.describe_model(model_id))

    async def tokenizer_info(self) -> Response:
        return _json(self._service.tokenizer_info())

    async def health(self) -> Response:
        try:
            async with asyncio.timeout(_HEALTH_TIMEOUT_S):
                await self._service.engine.check_ready()
        except TimeoutError:
            raise EngineDeadError(f"no answer from the engine in {_HEALTH_TIMEOUT_S:.0f} s") from None
        return _json({"status": "ready"})

    async def metrics(self) -> Response:
        return Response(await self._service.engine.metrics(), media_type=_PROMETHEUS)

    async def trace(self, request: Request) -> Response:
        if not getattr(request.state, "is_admin", False):
            raise HttpError.no_admin_key()
        traces = await self._service.engine.trace()
        return Response(await asyncio.to_thread(render_chrome_trace, traces), media_type="application/json")

    async def why(self, request: Request, request_id: str) -> Response:
        if not getattr(request.state, "is_admin", False):
            raise HttpError.no_admin_key()
        reports = await self._service.engine.why(request_id)
        return _json({"requests": [_late_request(report) for report in reports]})

    async def _read_body(self, request: Request, until_s: float = math.inf) -> dict[str, object]:
        return await read_json_object(
            request, max_body_bytes=self._config.max_body_bytes, until_s=until_s, late_message=_TOO_LATE
        )

    async def _generate(
        self,
        request: Request,
        answer: Callable[..., Awaitable[JsonObject]],
        stream: Callable[..., AsyncGenerator[JsonObject]],
    ) -> Response:
        now_s = asyncio.get_running_loop().time()
        until_s = read_deadline(request.headers, now_s=now_s, longest_s=self._config.request_timeout_s)
        body = await self._read_body(request, until_s)
        tenant: str = getattr(request.state, "tenant", "")
        if body.get("stream") is True:
            return EventStream(stream(body, tenant=tenant), until_s=until_s, message=_TOO_LATE)

        async def work() -> JsonObject:
            async with time_limit(until_s, _TOO_LATE):
                return await answer(body, tenant=tenant)

        return await _json_in_turns(await until_disconnect(request.receive, work()))


def _late_request(report: LateReport) -> JsonObject:
    return {
        "request_id": report.request_id,
        "tbt_s": report.tbt_s,
        "num_late": {**report.num_late},
        "gaps": [{**gap._asdict()} for gap in report.gaps],
    }


def _json(value: JsonObject) -> Response:
    return Response(encode_json(value), media_type="application/json")


async def _json_in_turns(answer: JsonObject) -> Response:
    """Return an answer, encoded choice by choice: a batch of echoes has 10 MB, which would hold up every stream."""
    choices = answer["choices"]
    assert isinstance(choices, list), type(choices)
    parts = []
    for choice in choices:
        parts.append(encode_json(choice))
        if len(parts[-1]) > _MANY_BYTES:
            await asyncio.sleep(0)
    # Within a string the quotes would be escaped.
    body = encode_json({**answer, "choices": []}).replace(b'"choices":[]', b'"choices":[%b]' % b",".join(parts), 1)
    return Response(body, media_type="application/json")


async def _answer_routing_error(request: Request, error: Exception) -> Response:
    return describe(error).to_response()


def _get(app: FastAPI, path: str, endpoint: Callable[..., Awaitable[Response]], answer: type[BaseModel] | None) -> None:
    statuses = (401, 404, 500, 503) if "{" in path else (401, 500, 503)
    described: dict[int | str, dict[str, Any]] = {status: {"model": responses.ErrorResponse} for status in statuses}
    described[200] = {"content": {"text/plain": {}}} if answer is None else {"model": answer}
    app.add_api_route(
        path, endpoint, methods=["GET"], response_class=Response, response_model=None, responses=described
    )
    if "{" not in path:  # load balancers ask so
        app.add_api_route(path, endpoint, methods=["HEAD"], response_class=Response, include_in_schema=False)


def _post(
    app: FastAPI,
    path: str,
    endpoint: Callable[..., Awaitable[Response]],
    bodies: tuple[type[BaseModel], ...],
    answer: type[BaseModel],
) -> None:
    schemas = [{"$ref": f"#/components/schemas/{body.__name__}"} for body in bodies]
    schema = schemas[0] if len(schemas) == 1 else {"oneOf": schemas}
    described: dict[int | str, dict[str, Any]] = {
        status: {"model": responses.ErrorResponse} for status in _ERROR_STATUSES
    }
    described[200] = {"model": answer}
    if path.endswith("completions"):
        described[200]["content"] = {EVENT_STREAM: {"schema": {"type": "string"}}}
    app.add_api_route(
        path,
        endpoint,
        methods=["POST"],
        response_class=Response,
        response_model=None,
        responses=described,
        openapi_extra={"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}},
    )


def _openapi(app: FastAPI, config: IngressConfig) -> dict[str, Any]:
    if app.openapi_schema is None:
        schema = get_openapi(title=app.title, version=app.version, routes=app.routes)
        _, bodies = models_json_schema(
            [(body, "validation") for body in _BODIES], ref_template="#/components/schemas/{model}"
        )
        schema["components"]["schemas"] |= bodies["$defs"]
        for body in (ChatCompletionRequest, CompletionRequest):
            _describe_fields(schema["components"]["schemas"][body.__name__]["properties"], config)
        for path, operations in schema["paths"].items():
            for operation in operations.values():
                operation["responses"].pop("422", None)  # FastAPI's own shape of errors, which is never sent
                if path.endswith("completions"):
                    operation["parameters"] = [_TIMEOUT_HEADER]
        if config.api_keys or config.admin_keys:
            schema["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
        if config.api_keys:
            schema["security"] = [{"key": []}]
        if config.admin_keys:
            for path in ("/debug/trace", "/debug/why/{request_id}"):
                schema["paths"][path]["get"]["security"] = [{"key": []}]
        app.openapi_schema = schema
    return app.openapi_schema


def _describe_fields(properties: dict[str, Any], config: IngressConfig) -> None:
    """Add what the models do not say: fields that are not read, and the limits of this server."""
    for name in IGNORED_FIELDS:
        properties.setdefault(name, {"description": "Ignored."})
    for name, values in OFF_VALUES.items():
        properties.setdefault(name, {"description": "Not supported; may only be off.", "enum": [*values, None]})
    properties["n"] = {
        "anyOf": [{"type": "integer", "minimum": 1, "maximum": config.max_num_choices}, {"type": "null"}]
    }
