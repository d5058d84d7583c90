"""Builders of small real objects for tests."""

from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.registry import load
from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.step import StepInput, StepOutput
from rayserve_sarathi.step_shape import StepTimeModel

VOCAB_SIZE = 1000


def make_request(
    request_id: str,
    *,
    prompt: int | Sequence[int] = 8,
    eos_token_ids: Iterable[int] = (),
    cache_salt: str = "",
    arrival_s: float = 0.0,
    output_token_ids: Sequence[int] = (),
    **sampling: Any,
) -> Request:
    """Make a request; a number as prompt makes a prompt of that many tokens that no other request id has."""
    if isinstance(prompt, int):
        rng = np.random.default_rng(abs(hash_of(request_id)))
        prompt = rng.integers(0, VOCAB_SIZE, prompt).tolist()
    return Request(
        request_id,
        prompt,
        SamplingParams(**sampling),
        eos_token_ids=eos_token_ids,
        output_token_ids=output_token_ids,
        cache_salt=cache_salt,
        arrival_s=arrival_s,
    )


def hash_of(text: str) -> int:
    """Return a number that depends on `text` alone (unlike `hash`, which differs from run to run)."""
    return int.from_bytes(text.encode(), "little") % (2**63)


def make_scheduler(
    policy: str = "sarathi",
    *,
    num_blocks: int = 64,
    block_size: int = 4,
    max_model_len: int | None = None,
    max_steps_in_flight: int = 1,
    num_decode_groups: int = 1,
    enable_prefix_caching: bool = True,
    slo: SloConfig | None = None,
    prior: StepTimeModel | None = None,
    is_async: bool = False,
    **config: Any,
) -> Scheduler:
    """Make a scheduler over a pool of its own; `max_model_len` defaults to the whole pool."""
    scheduler_config = SchedulerConfig(policy=policy, **config)
    blocks = BlockManager(
        num_blocks,
        block_size=block_size,
        watermark=scheduler_config.watermark,
        enable_prefix_caching=enable_prefix_caching,
    )
    scheduler: Scheduler = load("scheduler", policy, SCHEDULERS)(
        scheduler_config,
        blocks,
        max_model_len=max_model_len or num_blocks * block_size,
        vocab_size=VOCAB_SIZE,
        max_steps_in_flight=max_steps_in_flight,
        num_decode_groups=num_decode_groups,
        slo=slo,
        prior=prior,
        is_async=is_async,
    )
    return scheduler


class HashModel:
    """The smallest model whose tokens depend on every token before them: a running hash, kept in a paged KV pool.

    Like a real stage it knows blocks, not requests: if a block is shared wrongly, overwritten or skipped, its tokens
    come out different from those of `expected`.
    """

    def __init__(self, *, num_blocks: int, block_size: int) -> None:
        self._states = np.zeros(num_blocks * block_size, dtype=np.uint64)
        self._block_size = block_size
        self._sampled = np.empty(0, dtype=np.int32)

    def run(self, step: StepInput) -> StepOutput:
        """Compute `step` and sample its tokens."""
        token_ids = step.token_ids.copy()
        if step.pending is not None:
            token_ids[step.pending.positions] = self._sampled[step.pending.samples]
        tokens = iter(token_ids.tolist())
        tables = np.split(step.block_tables, np.cumsum(step.num_blocks)[:-1])
        last = []
        for query_len, context_len, table in zip(step.query_lens, step.context_lens, tables, strict=True):
            state = self._states[self._slot(table, context_len - 1)] if context_len else np.uint64(0)
            for position in range(context_len, context_len + query_len):
                state = next_state(state, next(tokens))
                self._states[self._slot(table, position)] = state
            last.append(state)
        self._sampled = np.array([sampled(last[index]) for index in step.sample_requests], dtype=np.int32)
        return StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=self._sampled)

    def _slot(self, table: Any, position: int) -> int:
        return int(table[position // self._block_size]) * self._block_size + position % self._block_size


def next_state(state: np.uint64, token_id: int) -> np.uint64:
    """Return the hash of all tokens up to and including `token_id`."""
    return np.uint64((int(state) * 6364136223846793005 + token_id + 1442695040888963407) % 2**64)


def sampled(state: np.uint64) -> int:
    """Return the token that follows `state`."""
    return int(state >> np.uint64(33)) % VOCAB_SIZE


def expected(prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
    """Return what `HashModel` generates from a prompt, computed without any cache."""
    state = np.uint64(0)
    for token_id in prompt_token_ids:
        state = next_state(state, token_id)
    output = []
    for _ in range(num_tokens):
        output.append(sampled(state))
        state = next_state(state, output[-1])
    return output
