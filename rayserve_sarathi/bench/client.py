"""A client of OpenAI's `/v1/completions` that keeps many streams open at little cost, and times every token.

By aiohttp, which parses HTTP in C. It comes with ray[serve].
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import aiohttp

from rayserve_sarathi.bench.outcome import Failure, FailureKind, Outcome
from rayserve_sarathi.bench.sse import EventParser
from rayserve_sarathi.bench.token_log import TokenLog
from rayserve_sarathi.errors import ConfigError

_KEEP_ALIVE_S = 2.0
"""Less than after what servers close an idle connection (uvicorn: 5 s): a request that meets the close would fail."""
_QUESTION_TIMEOUT_S = 30.0
_EVENT_STREAM = "text/event-stream"
_SHOWN_CHARS = 300


@dataclass(frozen=True, slots=True, kw_only=True)
class ServedModel:
    """An entry of `/v1/models`."""

    name: str
    max_model_len: int | None
    """None if the server does not tell it."""


class CompletionClient:
    """Sends prompts of token ids and times the tokens that stream back; an async context manager.

    Tokens are the most likely ones (temperature 0), unless `extra_body` says otherwise.

    Args:
        url: Of the server; a `/v1` at its end makes no difference.
        model: What the server calls the model.
        key: Sent as `Authorization: Bearer`; None sends none.
        timeout_s: How long to wait for a whole answer.
        ignore_eos: Whether each request has exactly as many tokens as asked for. An extension of OpenAI's API that
            vLLM, SGLang and this package know.
        has_continuous_usage: Whether to ask for the number of tokens in each chunk; see `token_log`.
        extra_body: More fields of each body, such as `min_tokens`.
        has_keep_alive: Whether requests follow each other on a connection. llama.cpp's server closes it after each,
            without saying so, and the next request would fail.
    """

    def __init__(
        self,
        url: str,
        *,
        model: str,
        key: str | None = None,
        timeout_s: float = 3600.0,
        ignore_eos: bool = True,
        has_continuous_usage: bool = True,
        extra_body: Mapping[str, object] | None = None,
        has_keep_alive: bool = True,
    ) -> None:
        self.url = url.rstrip("/").removesuffix("/v1")
        self.model = model
        self.num_tokens = 0
        """Tokens received so far, of all requests."""
        self._timeout_s = timeout_s
        self._head: dict[str, object] = {"model": model, "stream": True, "temperature": 0}
        self._head["stream_options"] = {"include_usage": True}
        if has_continuous_usage:
            self._head["stream_options"] = {"include_usage": True, "continuous_usage_stats": True}
        if ignore_eos:
            self._head["ignore_eos"] = True
        self._head |= extra_body or {}
        headers = {"accept-encoding": "identity"}  # packing would hold tokens back
        if key:
            headers["authorization"] = f"Bearer {key}"
        connector = (
            aiohttp.TCPConnector(limit=0, keepalive_timeout=_KEEP_ALIVE_S)
            if has_keep_alive
            else aiohttp.TCPConnector(limit=0, force_close=True)
        )
        self._session = aiohttp.ClientSession(
            connector=connector,
            headers=headers,
            timeout=aiohttp.ClientTimeout(total=timeout_s),
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._session.close()

    async def models(self) -> list[ServedModel]:
        """Return what the server serves.

        Raises:
            ConfigError: There is no server, or none with OpenAI's API.
        """
        listed = await self._ask_json("/v1/models")
        entries = listed.get("data") if isinstance(listed, dict) else None
        if not isinstance(entries, list) or not all(isinstance(entry, dict) and "id" in entry for entry in entries):
            raise ConfigError(f"{self.url}/v1/models is no list of models; give the URL of a server with OpenAI's API")
        return [
            ServedModel(name=str(entry["id"]), max_model_len=_positive(entry, "max_model_len")) for entry in entries
        ]

    async def vocab_size(self) -> int | None:
        """Return how many token ids the model has; None if the server does not tell."""
        try:
            info = await self._ask_json("/tokenizer_info")
        except ConfigError:
            return None
        return _positive(info, "vocab_size") if isinstance(info, dict) else None

    async def metrics(self) -> str | None:
        """Return the server's metrics in Prometheus's text format; None if it shows none."""
        try:
            return await self._ask("/metrics")
        except ConfigError:
            return None

    def encode(self, prompt_token_ids: Sequence[int], *, num_tokens: int) -> bytes:
        """Return the body that asks for `num_tokens` after a prompt; to be made before it is due, as it takes time."""
        body = {**self._head, "prompt": list(prompt_token_ids), "max_tokens": num_tokens}
        return json.dumps(body, separators=(",", ":")).encode()

    async def complete(self, body: bytes, *, num_prompt_tokens: int, num_tokens: int, due_s: float) -> Outcome:
        """Send a body now, read its stream to the end, and return what became of it; errors are part of that.

        Args:
            body: Of `encode`.
            num_prompt_tokens: Tokens of its prompt.
            num_tokens: Tokens that it asks for.
            due_s: When it should have been sent.
        """
        log = TokenLog()
        sent_s = time.perf_counter()
        failure: Failure | None
        try:
            failure = await self._stream(body, log)
        except aiohttp.ClientConnectorError as error:
            failure = Failure(kind=FailureKind.CONNECT, message=str(error))
        except TimeoutError:
            failure = Failure(kind=FailureKind.TIMEOUT, message=f"no complete answer in {self._timeout_s:g} s")
        except aiohttp.ClientPayloadError:
            failure = Failure(kind=FailureKind.DISCONNECT, message="the connection ended inside the stream")
        except (aiohttp.ClientError, OSError) as error:
            failure = Failure(kind=FailureKind.DISCONNECT, message=str(error) or type(error).__name__)
        told = log.num_prompt_tokens
        return Outcome(
            num_prompt_tokens=num_prompt_tokens if told is None else told,
            num_tokens_asked=num_tokens,
            num_output_tokens=log.num_tokens,
            due_s=due_s,
            sent_s=sent_s,
            end_s=time.perf_counter(),
            token_times_s=log.times_s,
            has_usage=log.has_usage,
            failure=failure,
        )

    async def _stream(self, body: bytes, log: TokenLog) -> Failure | None:
        headers = {"content-type": "application/json", "accept": _EVENT_STREAM}
        async with self._session.post(f"{self.url}/v1/completions", data=body, headers=headers) as response:
            if response.status != 200:
                return await _refusal(response)
            if response.content_type != _EVENT_STREAM:
                return Failure(kind=FailureKind.MALFORMED, message=f"the answer is {response.content_type}, no stream")
            parser = EventParser()
            async for data in response.content.iter_any():
                now_s = time.perf_counter()
                num_before = len(log.times_s)
                for event in parser.feed(data):
                    log.push(event, now_s)
                self.num_tokens += len(log.times_s) - num_before
                if log.failure is not None:
                    return log.failure
        if not log.is_complete:
            return Failure(kind=FailureKind.DISCONNECT, message="the stream ended without [DONE]")
        if not log.times_s:
            return Failure(kind=FailureKind.MALFORMED, message="the stream ended without a token")
        return None

    async def _ask_json(self, path: str) -> Any:
        text = await self._ask(path)
        try:
            return json.loads(text)
        except ValueError:
            raise ConfigError(f"{self.url}{path} answers no JSON, but {text[:60]!r}") from None

    async def _ask(self, path: str) -> str:
        timeout = aiohttp.ClientTimeout(total=_QUESTION_TIMEOUT_S)
        try:
            async with self._session.get(self.url + path, timeout=timeout) as response:
                if response.status == 401:
                    raise ConfigError(f"{self.url} lets nobody in without one of its API keys (401)")
                if response.status != 200:
                    raise ConfigError(f"{self.url}{path} answers {response.status} {response.reason}")
                return await response.text()
        except (aiohttp.InvalidURL, aiohttp.NonHttpUrlClientError):
            raise ConfigError(f"{self.url!r} is no URL; use one such as http://127.0.0.1:8000") from None
        except TimeoutError:
            raise ConfigError(
                f"{self.url} does not answer within {_QUESTION_TIMEOUT_S:g} s; is it the server?"
            ) from None
        except (aiohttp.ClientError, OSError) as error:
            raise ConfigError(f"no server at {self.url}: {error}") from None


async def _refusal(response: aiohttp.ClientResponse) -> Failure:
    text = (await response.read()).decode(errors="replace")
    try:
        message = str(json.loads(text)["error"]["message"])
    except (ValueError, LookupError, TypeError):
        message = text.strip() or str(response.reason)
    return Failure(
        kind=FailureKind.STATUS,
        message=message[:_SHOWN_CHARS],
        status=response.status,
        retry_after_s=_seconds(response.headers.get("retry-after")),
    )


def _seconds(value: str | None) -> float | None:
    return float(value) if value is not None and value.isdecimal() else None


def _positive(entry: Mapping[str, object], key: str) -> int | None:
    value = entry.get(key)
    return value if isinstance(value, int) and value > 0 else None
