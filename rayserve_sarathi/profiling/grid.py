"""Which steps to measure, and steps made without a scheduler."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import SAMPLING_DTYPE, Int32Array, StepInput, pack_sampling


@dataclass(frozen=True, slots=True, kw_only=True)
class Grid:
    """Sizes to measure, each list ascending.

    Args:
        decodes: Requests of a step that only decodes.
        decode_contexts: Tokens before each of them.
        chunks: Tokens of a step with a single chunk, at least 2.
        chunk_contexts: Tokens before it.
        repeats: How often each step is measured; the median counts.

    Raises:
        ConfigError: A list is empty, or a number is out of range.
    """

    decodes: tuple[int, ...]
    decode_contexts: tuple[int, ...]
    chunks: tuple[int, ...]
    chunk_contexts: tuple[int, ...]
    repeats: int = 5

    def __post_init__(self) -> None:
        for name, least in (("decodes", 1), ("decode_contexts", 0), ("chunks", 2), ("chunk_contexts", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ConfigError(f"{name} must be numbers of at least {least}, got {list(values)}")
        if self.repeats < 1:
            raise ConfigError(f"repeats must be at least 1, got {self.repeats}")

    def decode_steps(self, *, max_model_len: int, num_blocks: int, block_size: int) -> Iterator[tuple[int, int]]:
        """Yield number and context of the decodes of each step that the KV cache has room for."""
        for num_decodes in self.decodes:
            for context_len in self.decode_contexts:
                needed = num_decodes * -(-(context_len + 1) // block_size)
                if context_len < max_model_len and needed <= num_blocks:
                    yield num_decodes, context_len

    def chunk_steps(self, *, max_model_len: int, num_blocks: int, block_size: int) -> Iterator[tuple[int, int]]:
        """Yield tokens and context of the chunk of each step that the KV cache has room for."""
        for query_len in self.chunks:
            for context_len in self.chunk_contexts:
                seq_len = query_len + context_len
                if seq_len <= max_model_len and -(-seq_len // block_size) <= num_blocks:
                    yield query_len, context_len


def make_grid(*, max_tokens: int, max_decodes: int, max_context: int, repeats: int) -> Grid:
    """Return a grid up to the given sizes: dense where a device computes whole tiles, and doubling beyond.

    Args:
        max_tokens: Of a chunk.
        max_decodes: Of a step.
        max_context: Before a decode or a chunk.
        repeats: See `Grid`.

    Raises:
        ConfigError: A size is too small.
    """
    if max_tokens < 2 or max_decodes < 1 or max_context < 1:
        raise ConfigError(
            f"at least 2 tokens, 1 decode and 1 token of context are measured, got {max_tokens}, {max_decodes} and"
            f" {max_context}"
        )
    contexts = _up_to(max_context, (0, 64, *(256 * 2**power for power in range(20))))
    tiles = (*range(128, 513, 64), 640, 768, 896, *(512 * factor for factor in range(2, 64)))
    return Grid(
        decodes=_up_to(max_decodes, (1, 2, 4, 8, 16, 24, 32, 48, 64, *range(96, 1025, 32))),
        decode_contexts=contexts,
        chunks=_up_to(max_tokens, (2, 4, 8, 16, 32, 48, 64, 96, *tiles)),
        chunk_contexts=contexts,
        repeats=repeats,
    )


def make_step(
    *,
    num_decodes: int,
    decode_context: int,
    chunks: Sequence[tuple[int, int]],
    block_size: int,
    vocab_size: int,
    first_block: int = 0,
) -> StepInput:
    """Return a step of decodes and chunks whose requests share no block; each of them samples with the defaults.

    Args:
        num_decodes: Requests with a single token, after `decode_context` tokens each.
        decode_context: See above.
        chunks: `(query_len, context_len)` of others.
        block_size: Tokens in a block.
        vocab_size: Tokens are drawn from it.
        first_block: Blocks are taken from here on.
    """
    parts = [(1, decode_context)] * num_decodes + list(chunks)
    query_lens, context_lens = (_packed(values) for values in zip(*parts, strict=True))
    num_blocks = -(-(query_lens + context_lens) // block_size)
    num_tokens = int(query_lens.sum())
    return StepInput(
        step_id=0,
        epoch=0,
        request_ids=tuple(map(str, range(len(parts)))),
        token_ids=np.random.default_rng(num_tokens).integers(0, vocab_size, num_tokens, dtype=np.int32),
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=_packed(range(first_block, first_block + int(num_blocks.sum()))),
        num_blocks=num_blocks,
        sample_requests=_packed(range(len(parts))),
        sampling=np.frombuffer(pack_sampling(SamplingParams()) * len(parts), dtype=SAMPLING_DTYPE),
    )


def _packed(values: Sequence[int]) -> Int32Array:
    return np.array(values, dtype=np.int32)


def _up_to(most: int, values: Sequence[int]) -> tuple[int, ...]:
    return tuple(sorted({*(value for value in values if value < most), most}))
