"""One choice as a stream of text, and many choices as one stream.

Whoever closes a stream, or is cancelled while waiting for it, closes the engine's generators below, so that the engine
frees what they hold.
"""

import asyncio
from collections.abc import AsyncGenerator, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from typing import NamedTuple, TypeVar, cast

from rayserve_sarathi.openai.engine_client import EngineClient
from rayserve_sarathi.openai.errors import EngineFailureError
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams, TokenLogprobs
from rayserve_sarathi.text.output_text import OutputText
from rayserve_sarathi.text.stop import StopStrings
from rayserve_sarathi.text.tokenizer import Tokenizer

_Item = TypeVar("_Item")


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """One output to generate."""

    request_id: str
    prompt_token_ids: Sequence[int]
    sampling: SamplingParams
    stops: StopStrings
    skip_special_tokens: bool = True
    cache_salt: str = ""


class PlacedLogprobs(NamedTuple):
    """Log-probabilities of a token, and where its text begins in the output."""

    logprobs: TokenLogprobs
    text_offset: int


class ChoiceDelta(NamedTuple):
    """What is new in one output."""

    choice_index: int
    text: str
    num_tokens: int
    num_cached_tokens: int = 0
    logprobs: tuple[PlacedLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it, if one did."""


async def generate_choice(
    engine: EngineClient, tokenizer: Tokenizer, choice: Choice, *, index: int
) -> AsyncGenerator[ChoiceDelta]:
    """Yield the deltas of one choice, the `index`-th of its request; the last has a finish reason.

    Raises:
        EngineFailureError: The engine gave up on it.
    """
    text = _ChoiceText(tokenizer, choice, index=index)
    generated = engine.generate(
        choice.request_id, choice.prompt_token_ids, choice.sampling, cache_salt=choice.cache_salt
    )
    last: ChoiceDelta | None = None
    # The protocol says that it is an async generator, which its type cannot say for a plain `def`.
    async with aclosing(cast("AsyncGenerator[RequestOutput]", generated)) as outputs:
        async for output in outputs:
            delta = text.push(output)
            if delta.finish_reason is not None:
                if output.finish_reason is None:
                    engine.finish(choice.request_id)
                last = delta
                break
            yield delta
    if last is None:
        raise EngineFailureError(f"request {choice.request_id} ended without a reason")
    yield last


class _ChoiceText:
    """Turns the engine's outputs of one choice into deltas."""

    def __init__(self, tokenizer: Tokenizer, choice: Choice, *, index: int) -> None:
        self._index = index
        self._request_id = choice.request_id
        self._text = OutputText(
            tokenizer.detokenizer(skip_special_tokens=choice.skip_special_tokens),
            choice.stops,
            min_tokens=choice.sampling.min_tokens,
        )
        self._is_stop_included = choice.stops.is_included
        self._stop_token_ids = choice.sampling.stop_token_ids
        self._held_logprobs: list[PlacedLogprobs] = []

    def push(self, output: RequestOutput) -> ChoiceDelta:
        if output.finish_reason in (FinishReason.ERROR, FinishReason.ABORT):
            raise EngineFailureError(f"request {self._request_id}: {output.error or 'aborted by the engine'}")
        # The token that ended a request is part of its tokens, but of its text only on demand.
        is_last_hidden = output.finish_reason is FinishReason.STOP and not self._is_stop_included
        num_visible = len(output.token_ids) - is_last_hidden
        parts: list[str] = []
        num_tokens = 0
        for place, token_id in enumerate(output.token_ids):
            num_tokens += 1
            if output.logprobs is not None:
                self._held_logprobs.append(PlacedLogprobs(output.logprobs[place], self._text.num_chars))
            if place < num_visible:
                parts.append(self._text.push(token_id))
            if self._text.matched_stop is not None:
                break
        return self._delta(output, parts, num_tokens)

    def _delta(self, output: RequestOutput, parts: list[str], num_tokens: int) -> ChoiceDelta:
        finish_reason: FinishReason | None = output.finish_reason
        stop_reason: str | int | None = None
        if finish_reason is FinishReason.STOP and output.token_ids and output.token_ids[-1] in self._stop_token_ids:
            stop_reason = output.token_ids[-1]
        if finish_reason is not None and self._text.matched_stop is None:
            parts.append(self._text.flush())
        if self._text.matched_stop is not None:
            finish_reason, stop_reason = FinishReason.STOP, self._text.matched_stop
        return ChoiceDelta(
            choice_index=self._index,
            text="".join(parts),
            num_tokens=num_tokens,
            num_cached_tokens=output.num_cached_tokens,
            logprobs=self._release_logprobs(is_finished=finish_reason is not None) if self._held_logprobs else (),
            prompt_logprobs=output.prompt_logprobs or (),
            finish_reason=finish_reason,
            stop_reason=stop_reason,
        )

    def _release_logprobs(self, *, is_finished: bool) -> tuple[PlacedLogprobs, ...]:
        """Return those of tokens whose text is shown; at a stop string, those of the text behind it are dropped."""
        if self._text.matched_stop is None and is_finished:
            released, self._held_logprobs = self._held_logprobs, []
        else:
            released = [placed for placed in self._held_logprobs if placed.text_offset < self._text.num_shown_chars]
            self._held_logprobs = self._held_logprobs[len(released) :]
        return tuple(released)


def merge(streams: Sequence[AsyncGenerator[_Item]]) -> AsyncGenerator[_Item]:
    """Return a stream of the items of all streams as they come; closing it closes all of them."""
    return streams[0] if len(streams) == 1 else _merge(streams)


async def _merge(streams: Sequence[AsyncGenerator[_Item]]) -> AsyncGenerator[_Item]:
    # Without a limit: whatever a slow reader leaves here would otherwise wait in the engine's client.
    queue: asyncio.Queue[_Item | asyncio.Task[None]] = asyncio.Queue()
    tasks = [asyncio.create_task(_pump(stream, queue)) for stream in streams]
    for task in tasks:
        task.add_done_callback(queue.put_nowait)
    try:
        num_running = len(tasks)
        while num_running:
            received = await queue.get()
            if isinstance(received, asyncio.Task):
                received.result()  # raises what ended the stream
                num_running -= 1
            else:
                yield received
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def _pump(stream: AsyncGenerator[_Item], queue: "asyncio.Queue[_Item | asyncio.Task[None]]") -> None:
    async with aclosing(stream) as items:
        async for item in items:
            queue.put_nowait(item)
