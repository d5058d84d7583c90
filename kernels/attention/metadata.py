"""Which tokens of a step belong together and where their keys are, worked out on the host once per step.

Dimensions: T tokens in the step; R requests; S tokens per block; M longest block table; B decodes in a group.

    |<---- context_len ---->|<-- query_len -->|
    |<---------------- seq_len -------------->|
"""

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


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionMetadata:
    """Attention's view of a step: requests with a single token first, then chunks.

    Args:
        positions: Of each token in its request, [T] int64.
        slot_mapping: Block id * S + offset of each token, [T] int64.
        new_block_ids: Blocks whose first slot is written in this step, int64.
        cu_query_lens: First token of each request, and T, [R + 1] int32.
        context_lens: [R] int32; `seq_lens` likewise.
        block_tables: Padded with each request's own first block, [R, M] int32.
        max_query_len: Longest chunk; `max_seq_len` likewise.
        num_decodes: Leading requests with a single token; they are what `decode_groups` holds.
        decode_groups: The decodes by length, for backends that pad.
        chunk_pieces: The other requests, for backends that loop.
    """

    positions: Tensor
    slot_mapping: Tensor
    new_block_ids: Tensor
    cu_query_lens: Tensor
    context_lens: Tensor
    seq_lens: Tensor
    block_tables: Tensor
    max_query_len: int
    max_seq_len: int
    num_decodes: int
    decode_groups: tuple[DecodeGroup, ...]
    chunk_pieces: tuple[ChunkPiece, ...]


def build_metadata(
    *,
    query_lens: _IntArray,
    context_lens: _IntArray,
    block_tables: _IntArray,
    num_blocks: _IntArray,
    block_size: int,
    device: torch.device,
) -> AttentionMetadata:
    """Work out a step's metadata.

    Args:
        query_lens: Tokens of each request in the step, [R]; at least one request, at least one token each.
        context_lens: Tokens of each request before, [R].
        block_tables: Block ids of each request's context and chunk, concatenated.
        num_blocks: Length of each request's part of `block_tables`, [R].
        block_size: Tokens per block.
        device: Where the tensors go.
    """
    query_lens = query_lens.astype(np.int64)
    seq_lens = context_lens + query_lens
    cu_query_lens = np.concatenate(([0], np.cumsum(query_lens)))
    num_needed = -(-seq_lens // block_size)
    tables = _pad_block_tables(block_tables, num_blocks.astype(np.int64), num_needed)

    # The tokens of a chunk are at successive positions: count all tokens, and shift each request's.
    request_of = np.repeat(np.arange(len(query_lens)), query_lens)
    positions = np.arange(cu_query_lens[-1]) + (context_lens - cu_query_lens[:-1])[request_of]
    block_ids = tables[request_of, positions // block_size]
    offsets = positions % block_size
    is_chunk = query_lens > 1
    num_decodes = int(is_chunk.argmax()) if is_chunk.any() else len(query_lens)

    def tensor(array: _IntArray, dtype: torch.dtype) -> Tensor:
        return torch.tensor(array, dtype=dtype, device=device)

    return AttentionMetadata(
        positions=tensor(positions, torch.int64),
        slot_mapping=tensor(block_ids * block_size + offsets, torch.int64),
        new_block_ids=tensor(block_ids[offsets == 0], torch.int64),
        cu_query_lens=tensor(cu_query_lens, torch.int32),
        context_lens=tensor(context_lens, torch.int32),
        seq_lens=tensor(seq_lens, torch.int32),
        block_tables=tensor(tables, torch.int32),
        max_query_len=int(query_lens.max()),
        max_seq_len=int(seq_lens.max()),
        num_decodes=num_decodes,
        decode_groups=tuple(
            DecodeGroup(
                rows=tensor(rows, torch.int64),
                block_ids=tensor(tables[rows, : num_needed[rows].max()], torch.int64),
                seq_lens=tensor(seq_lens[rows, None], torch.int64),
            )
            for rows in _group_decodes(num_needed[:num_decodes], block_size)
        ),
        chunk_pieces=tuple(
            ChunkPiece(
                start=start,
                query_len=query_len,
                context_len=context_len,
                block_ids=tensor(tables[request, : -(-(context_len + query_len) // block_size)], torch.int64),
            )
            for request in range(num_decodes, len(query_lens))
            for start, query_len, context_len in _cut(
                int(cu_query_lens[request]), int(query_lens[request]), int(context_lens[request])
            )
        ),
    )


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
