"""Run the choices of a request and shape what they yield as one JSON object, or as a stream of chunks.

Plain dictionaries: a chunk is made for every token, where a pydantic model would cost more than all the rest.
"""

import asyncio
import math
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass
from itertools import chain
from typing import Protocol

from rayserve_sarathi.openai.engine_client import EngineClient
from rayserve_sarathi.openai.generation import Choice, ChoiceDelta, generate_choice, merge
from rayserve_sarathi.openai.prompts import PromptTokens, off_loop
from rayserve_sarathi.openai.protocol import StreamOptions
from rayserve_sarathi.scheduling.late_tokens import LateGap
from rayserve_sarathi.text.tokenizer import Tokenizer

JsonObject = dict[str, object]


class ChoiceFormat(Protocol):
    """The shape of a choice in one of the two APIs."""

    object_name: str
    chunk_object_name: str

    def choice(self, delta: ChoiceDelta) -> JsonObject:
        """Return a whole choice."""

    def chunk_choice(self, delta: ChoiceDelta, *, is_first: bool) -> JsonObject:
        """Return what is new in a choice."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """A request that is ready to run."""

    answer_id: str
    created: int
    model: str
    prompts: Sequence[PromptTokens]
    choices: Sequence[Choice]
    """`num_choices_per_prompt` of the first prompt, then of the second, and so on."""
    choice_format: ChoiceFormat
    stream_options: StreamOptions


class _Usage:
    """Tokens read and written so far."""

    def __init__(self, plan: Plan) -> None:
        self._num_prompt_tokens = sum(len(prompt.token_ids) for prompt in plan.prompts)
        self._num_completion_tokens = 0
        self._num_choices_per_prompt = len(plan.choices) // len(plan.prompts)
        self._num_cached_tokens = [0] * len(plan.prompts)

    def add(self, delta: ChoiceDelta) -> None:
        self._num_completion_tokens += delta.num_tokens
        # All choices of a prompt read the same tokens, which are counted once.
        if delta.num_cached_tokens and delta.choice_index % self._num_choices_per_prompt == 0:
            self._num_cached_tokens[delta.choice_index // self._num_choices_per_prompt] = delta.num_cached_tokens

    def to_json(self) -> JsonObject:
        return {
            "prompt_tokens": self._num_prompt_tokens,
            "completion_tokens": self._num_completion_tokens,
            "total_tokens": self._num_prompt_tokens + self._num_completion_tokens,
            "prompt_tokens_details": {"cached_tokens": sum(self._num_cached_tokens)},
        }


def _run(engine: EngineClient, tokenizer: Tokenizer, plan: Plan) -> AsyncGenerator[ChoiceDelta]:
    return merge([generate_choice(engine, tokenizer, choice, index=index) for index, choice in enumerate(plan.choices)])


async def answer(engine: EngineClient, tokenizer: Tokenizer, plan: Plan) -> JsonObject:
    """Return the answer once all choices are done."""
    usage = _Usage(plan)
    collected: list[list[ChoiceDelta]] = [[] for _ in plan.choices]
    async with aclosing(_run(engine, tokenizer, plan)) as deltas:
        async for delta in deltas:
            usage.add(delta)
            collected[delta.choice_index].append(delta)
    joined = [_join(deltas) for deltas in collected]
    # An echo of a batch (lm-eval) holds the log-probabilities of ten thousands of tokens.
    num_logprobs = sum(len(delta.logprobs) + len(delta.prompt_logprobs) for delta in joined)
    choices = await off_loop(num_logprobs, lambda: [plan.choice_format.choice(delta) for delta in joined])
    return {
        "id": plan.answer_id,
        "object": plan.choice_format.object_name,
        "created": plan.created,
        "model": plan.model,
        "choices": choices,
        "usage": usage.to_json(),
    }


async def stream_answer(
    engine: EngineClient, tokenizer: Tokenizer, make_plan: Callable[[], Awaitable[Plan]]
) -> AsyncGenerator[JsonObject]:
    """Yield the chunks of the answer as tokens come; whoever takes longer than `tbt_s` for one is a slow reader.

    Each generator between the engine and a client costs every token a microsecond, so that planning is done in here.
    """
    plan = await make_plan()
    usage = _Usage(plan)
    clock = asyncio.get_running_loop().time
    slow_s = math.inf if engine.tbt_s is None else engine.tbt_s
    num_tokens = [0] * len(plan.choices)
    has_usage = plan.stream_options.include_usage is True
    has_continuous_usage = plan.stream_options.continuous_usage_stats is True
    head: JsonObject = {
        "id": plan.answer_id,
        "object": plan.choice_format.chunk_object_name,
        "created": plan.created,
        "model": plan.model,
    }
    tail: JsonObject = {"usage": None} if has_usage else {}
    started: set[int] = set()
    async with aclosing(_run(engine, tokenizer, plan)) as deltas:
        async for delta in deltas:
            index = delta.choice_index
            usage.add(delta)
            num_tokens[index] += delta.num_tokens
            is_first = index not in started
            # Nothing to see, as for part of a character; but the first token always shows that the choice began.
            if not (delta.text or delta.logprobs or delta.finish_reason or is_first or has_continuous_usage):
                continue
            started.add(index)
            if has_continuous_usage:
                tail = {"usage": usage.to_json()}
            begin_s = clock()
            yield {**head, "choices": [plan.choice_format.chunk_choice(delta, is_first=is_first)], **tail}
            held_s = clock() - begin_s
            if held_s > slow_s:
                gap = LateGap(num_tokens[index] - 1, held_s, "slow_reader", culprit=None)
                engine.note_late(plan.choices[index].request_id, gap)
    if has_usage:
        yield {**head, "choices": [], "usage": usage.to_json()}


def _join(deltas: Sequence[ChoiceDelta]) -> ChoiceDelta:
    return deltas[-1]._replace(
        text="".join(delta.text for delta in deltas),
        num_tokens=sum(delta.num_tokens for delta in deltas),
        logprobs=tuple(chain.from_iterable(delta.logprobs for delta in deltas)),
        prompt_logprobs=tuple(chain.from_iterable(delta.prompt_logprobs for delta in deltas)),
    )
