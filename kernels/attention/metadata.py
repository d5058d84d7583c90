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

from rayserve_sarathi.kernels.gpu import on_device

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


class StepLayout:
    """Which tokens of a step belong together and where their keys are, on the host: requests with a single token first.

    Attributes:
        query_lens: Tokens of each request in the step, [R] int64.
        context_lens: Tokens of each request before, [R] int64.
        seq_lens: Both together, [R] int64.
        cu_query_lens: First token of each request, and T, [R + 1] int64.
        positions: Of each token in its request, [T] int64.
        slot_mapping: Block id * S + offset of each token, [T] int64.
        new_block_ids: Blocks whose first slot is written in this step, int64.
        num_needed: Blocks with tokens in them, [R] int64.
        block_tables: Padded with each request's own first block, [R, M] int64.
        block_size: S.

    Args:
        query_lens: At least one request, at least one token each.
        context_lens: [R].
        block_tables: Block ids of each request's context and chunk, concatenated.
        num_blocks: Length of each request's part of `block_tables`, [R].
        block_size: Tokens per block.
    """

    def __init__(
        self,
        *,
        query_lens: _IntArray,
        context_lens: _IntArray,
        block_tables: _IntArray,
        num_blocks: _IntArray,
        block_size: int,
    ) -> None:
        self.query_lens = query_lens = query_lens.astype(np.int64)
        self.context_lens = context_lens = context_lens.astype(np.int64)
        self.seq_lens = context_lens + query_lens
        self.cu_query_lens = _sums(query_lens)
        self.block_size = block_size
        self.num_needed = -(-self.seq_lens // block_size)
        self.block_tables = _pad_block_tables(block_tables, num_blocks.astype(np.int64), self.num_needed)

        # The tokens of a chunk are at successive positions: count all tokens, and shift each request's.
        request_of = np.repeat(np.arange(len(query_lens)), query_lens)
        self.positions = np.arange(self.cu_query_lens[-1]) + (context_lens - self.cu_query_lens[:-1])[request_of]
        block_ids = self.block_tables[request_of, self.positions // block_size]
        offsets = self.positions % block_size
        self.slot_mapping = block_ids * block_size + offsets
        self.new_block_ids = block_ids[offsets == 0]

    @property
    def num_decodes(self) -> int:
        """How many requests, the first ones, have a single token."""
        is_chunk = self.query_lens > 1
        return int(is_chunk.argmax()) if is_chunk.any() else len(self.query_lens)


@dataclass(frozen=True, kw_only=True)
class AttentionMetadata:
    """Attention's view of a step, on its device.

    Args:
        positions: Of each token in its request, [T] int32.
        slot_mapping: Block id * S + offset of each token, [T] int32; less than 0 for one that is not stored.
        cu_query_lens: First token of each request, and T, [R + 1] int32.
        seq_lens: [R] int32.
        block_tables: Padded with each request's own first block, [R, M] int32.
        has_chunks: Whether any request has more than one token; without, token i is request i's.
        new_block_ids: Blocks whose first slot is written in this step, int32.
        cu_seq_lens: Sums of `seq_lens`, from 0, [R + 1] int32.
        layout: The step.
    """

    positions: Tensor
    slot_mapping: Tensor
    cu_query_lens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    has_chunks: bool
    new_block_ids: Tensor
    cu_seq_lens: Tensor
    layout: StepLayout

    @classmethod
    def of(cls, layout: StepLayout, device: torch.device) -> "AttentionMetadata":
        """Copy a step to the device."""
        positions, slot_mapping, cu_query_lens, seq_lens, block_tables, new_block_ids, cu_seq_lens = to_device(
            (
                layout.positions,
                layout.slot_mapping,
                layout.cu_query_lens,
                layout.seq_lens,
                layout.block_tables,
                layout.new_block_ids,
                _sums(layout.seq_lens),
            ),
            device,
        )
        return cls(
            positions=positions,
            slot_mapping=slot_mapping,
            cu_query_lens=cu_query_lens,
            seq_lens=seq_lens,
            block_tables=block_tables,
            has_chunks=layout.num_decodes < len(layout.query_lens),
            new_block_ids=new_block_ids,
            cu_seq_lens=cu_seq_lens,
            layout=layout,
        )

    def last_rows(self) -> Tensor:
        """Return where in the step each request's last token is, [R] int32."""
        return self.cu_query_lens[1:] - 1

    def of_last_tokens(self) -> "AttentionMetadata":
        """Return the step as if it had each request's last token alone, to attend once keys and values are stored."""
        layout = self.layout
        num_requests, num_columns = layout.block_tables.shape
        return AttentionMetadata(
            positions=self.seq_lens - 1,
            slot_mapping=torch.full_like(self.seq_lens, -1),
            cu_query_lens=torch.arange(len(self.seq_lens) + 1, dtype=torch.int32, device=self.seq_lens.device),
            seq_lens=self.seq_lens,
            block_tables=self.block_tables,
            has_chunks=False,
            new_block_ids=self.new_block_ids[:0],
            cu_seq_lens=self.cu_seq_lens,
            layout=StepLayout(
                query_lens=np.ones_like(layout.query_lens),
                context_lens=layout.seq_lens - 1,
                block_tables=layout.block_tables.ravel(),
                num_blocks=np.full(num_requests, num_columns),
                block_size=layout.block_size,
            ),
        )

    @functools.cached_property
    def decode_groups(self) -> tuple[DecodeGroup, ...]:
        """The leading requests with a single token, by length, for backends that pad."""
        layout = self.layout
        return tuple(
            DecodeGroup(
                rows=self._tensor(rows),
                block_ids=self._tensor(layout.block_tables[rows, : layout.num_needed[rows].max()]),
                seq_lens=self._tensor(layout.seq_lens[rows, None]),
            )
            for rows in _group_decodes(layout.num_needed[: layout.num_decodes], layout.block_size)
        )

    @functools.cached_property
    def chunk_pieces(self) -> tuple[ChunkPiece, ...]:
        """The other requests, for backends that loop."""
        layout = self.layout
        return tuple(
            ChunkPiece(
                start=start,
                query_len=query_len,
                context_len=context_len,
                block_ids=self._tensor(
                    layout.block_tables[request, : -(-(context_len + query_len) // layout.block_size)]
                ),
            )
            for request in range(layout.num_decodes, len(layout.query_lens))
            for start, query_len, context_len in _cut(
                int(layout.cu_query_lens[request]), int(layout.query_lens[request]), int(layout.context_lens[request])
            )
        )

    def _tensor(self, array: npt.NDArray[np.int64]) -> Tensor:
        return torch.tensor(array, device=self.positions.device)


def _sums(lens: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the sums of the first 0, 1, ... of the lengths, [R + 1]."""
    return np.concatenate(([0], np.cumsum(lens)))


def to_device(arrays: Sequence[_IntArray], device: torch.device) -> tuple[Tensor, ...]:
    """Return the arrays as int32 tensors of the same shapes; one copy for all, as each to a GPU takes some 10 us."""
    packed = np.concatenate([array.ravel() for array in arrays], dtype=np.int32, casting="unsafe")
    parts = torch.split(on_device(torch.from_numpy(packed), device), [array.size for array in arrays])
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
