"""Which tokens of a step belong together and where their keys are, worked out on the host once per step.

Dimensions: T tokens in the step; R requests; S tokens per block; M longest block table; B decodes in a group.

    |<---- context_len ---->|<-- query_len -->|
    |<---------------- seq_len -------------->|
"""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# A gather of more tokens than this leaves the cache of a CPU before it is used, and its memory is mapped anew each
# time: 32 decodes of 1024 tokens took half the time in groups of 8192 tokens.
_MAX_GROUP_TOKENS = 8192
# Decodes of at most this many blocks are never worth a group of their own.
_MIN_GROUP_BLOCKS = 8
# A chunk is attended to in pieces, which bounds the mask and saves the keys that a piece cannot see.
_MAX_PIECE_LEN = 512

_IntArray = npt.NDArray[np.int32] | npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True, kw_only=True)
class DecodeGroup:
    """Requests with a single token in this step and contexts of similar length.

    Args:
        rows: Their tokens in the step, [B] int64.
        block_ids: Their block tables, padded with each request's own first block, [B, longest of the group] int64.
        seq_lens: [B, 1] int64.
    """

    rows: Tensor
    block_ids: Tensor
    seq_lens: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class ChunkPiece:
    """At most 512 successive tokens of one request's chunk.

    Args:
        start: First token in the step.
        query_len: Tokens.
        context_len: Tokens of the request before the first.
        block_ids: Blocks of context and piece, int64.
    """

    start: int
    query_len: int
    context_len: int
    block_ids: Tensor


class AttentionMetadata:
    """Attention's view of a step: requests with a single token first, then chunks.

    Attributes:
        positions: Of each token in its request, [T] int32.
        slot_mapping: Block id * S + offset of each token, [T] int32.
        new_block_ids: Blocks whose first slot is written in this step, int32.
        cu_query_lens: First token of each request, and T, [R + 1] int32.
        seq_lens: [R] int32.
        cu_seq_lens: Sums of `seq_lens`, from 0, [R + 1] int32.
        block_tables: Padded with each request's own first block, [R, M] int32.
        max_query_len: Largest of the query lengths.
        max_seq_len: Largest of `seq_lens`.
        has_chunks: Whether any request has more than one token.

    Args:
        query_lens: Tokens of each request in the step, [R]; at least one request, at least one token each.
        context_lens: Tokens of each request before, [R].
        block_tables: Block ids of each request's context and chunk, concatenated.
        num_blocks: Length of each request's part of `block_tables`, [R].
        block_size: Tokens per block.
        device: Where the tensors go.
    """

    def __init__(
        self,
        *,
        query_lens: _IntArray,
        context_lens: _IntArray,
        block_tables: _IntArray,
        num_blocks: _IntArray,
        block_size: int,
        device: torch.device,
    ) -> None:
        self._query_lens = query_lens = query_lens.astype(np.int64)
        self._context_lens = context_lens
        self._seq_lens = seq_lens = context_lens + query_lens
        self._first_tokens = cu_query_lens = np.concatenate(([0], np.cumsum(query_lens)))
        self._num_needed = num_needed = -(-seq_lens // block_size)
        self._tables = tables = _pad_block_tables(block_tables, num_blocks.astype(np.int64), num_needed)
        self._block_size = block_size
        self._device = device

        # The tokens of a chunk are at successive positions: count all tokens, and shift each request's.
        request_of = np.repeat(np.arange(len(query_lens)), query_lens)
        positions = np.arange(cu_query_lens[-1]) + (context_lens - cu_query_lens[:-1])[request_of]
        block_ids = tables[request_of, positions // block_size]
        offsets = positions % block_size
        is_chunk = query_lens > 1
        self.max_query_len, self.max_seq_len = int(query_lens.max()), int(seq_lens.max())
        self.has_chunks = self.max_query_len > 1
        self._num_decodes = int(is_chunk.argmax()) if self.has_chunks else len(query_lens)

        (
            self.positions,
            self.slot_mapping,
            self.new_block_ids,
            self.cu_query_lens,
            self.seq_lens,
            self.cu_seq_lens,
            self.block_tables,
        ) = to_device(
            (
                positions,
                block_ids * block_size + offsets,
                block_ids[offsets == 0],
                cu_query_lens,
                seq_lens,
                np.concatenate(([0], np.cumsum(seq_lens))),
                tables,
            ),
            device,
        )

    @functools.cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """The leading requests with a single token, by length, for backends that pad."""
        return tuple(
            DecodeGroup(
                rows=self._tensor(rows, torch.int64),
                block_ids=self._tensor(self._tables[rows, : self._num_needed[rows].max()], torch.int64),
                seq_lens=self._tensor(self._seq_lens[rows, None], torch.int64),
            )
            for rows in _group_decodes(self._num_needed[: self._num_decodes], self._block_size)
        )

    @functools.cached_property
    def chunk_pieces(self) -> tuple[ChunkPiece, ...]:
        """The other requests, for backends that loop."""
        return tuple(
            ChunkPiece(
                start=start,
                query_len=query_len,
                context_len=context_len,
                block_ids=self._tensor(
                    self._tables[request, : -(-(context_len + query_len) // self._block_size)], torch.int64
                ),
            )
            for request in range(self._num_decodes, len(self._query_lens))
            for start, query_len, context_len in _cut(
                int(self._first_tokens[request]), int(self._query_lens[request]), int(self._context_lens[request])
            )
        )

    def _tensor(self, array: _IntArray, dtype: torch.dtype) -> Tensor:
        return torch.tensor(array, dtype=dtype, device=self._device)


def to_device(arrays: Sequence[_IntArray], device: torch.device) -> tuple[Tensor, ...]:
    """Return the arrays as int32 tensors of the same shapes; one copy for all, as each to a GPU takes some 10 us."""
    packed = np.concatenate([array.ravel() for array in arrays], dtype=np.int32, casting="unsafe")
    parts = torch.from_numpy(packed).to(device).split([array.size for array in arrays])
    return tuple(part.view(array.shape) for part, array in zip(parts, arrays, strict=True))


def _pad_block_tables(
    block_tables: _IntArray, num_blocks: npt.NDArray[np.int64], num_needed: npt.NDArray[np.int64]
) -> npt.NDArray[np.int64]:
    """Return one row per request, [R, M]: the blocks with tokens in them, padded with the first of them.

    What other blocks hold is none of a request's business; it may be NaN.
    """
    assert (num_needed <= num_blocks).all(), f"blocks {num_blocks.tolist()}, needed {num_needed.tolist()}"
    starts = np.cumsum(num_blocks) - num_blocks
    column = np.arange(num_needed.max())
    index = np.where(column < num_needed[:, None], starts[:, None] + column, starts[:, None])
    return block_tables.astype(np.int64)[index]


def _group_decodes(num_blocks: npt.NDArray[np.int64], block_size: int) -> list[npt.NDArray[np.int64]]:
    """Return the decodes in groups, longest first, so that less than a third of a group is padding."""
    order = np.argsort(-num_blocks, kind="stable")
    groups = []
    begin = 0
    while begin < len(order):
        longest = max(int(num_blocks[order[begin]]), _MIN_GROUP_BLOCKS)
        # Sorted by falling length, so the requests that are long enough come first.
        end = begin + int((3 * np.maximum(num_blocks[order[begin:]], _MIN_GROUP_BLOCKS) >= 2 * longest).sum())
        end = min(end, begin + max(1, _MAX_GROUP_TOKENS // (longest * block_size)))
        groups.append(order[begin:end])
        begin = end
    return groups


def _cut(start: int, query_len: int, context_len: int) -> list[tuple[int, int, int]]:
    """Return (start, query_len, context_len) of each piece of a chunk."""
    return [
        (start + done, min(_MAX_PIECE_LEN, query_len - done), context_len + done)
        for done in range(0, query_len, _MAX_PIECE_LEN)
    ]
