import numpy as np
import torch

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout


def build(lens: list[tuple[int, int]], *, block_size: int = 4) -> AttentionMetadata:
    """Build the metadata of (query_len, context_len) requests whose blocks are numbered from 100 on."""
    query_lens, context_lens = (np.array(values, dtype=np.int32) for values in zip(*lens, strict=True))
    num_blocks = -(-(query_lens + context_lens) // block_size)
    layout = StepLayout(
        query_lens=query_lens,
        context_lens=context_lens,
        block_tables=np.arange(100, 100 + num_blocks.sum(), dtype=np.int32),
        num_blocks=num_blocks,
        block_size=block_size,
    )
    return AttentionMetadata.of(layout, torch.device("cpu"))


def test_positions_and_slots_of_a_mixed_step() -> None:
    metadata = build([(1, 5), (1, 0), (3, 2)])

    assert metadata.positions.tolist() == [5, 0, 2, 3, 4]
    assert metadata.slot_mapping.tolist() == [101 * 4 + 1, 102 * 4, 103 * 4 + 2, 103 * 4 + 3, 104 * 4]
    assert metadata.cu_query_lens.tolist() == [0, 1, 2, 5]
    assert metadata.seq_lens.tolist() == [6, 1, 5]


def test_blocks_that_are_begun_in_the_step_are_named() -> None:
    assert build([(1, 5), (1, 4), (9, 3)]).new_block_ids.tolist() == [103, 105, 106]


def test_a_block_table_is_padded_with_the_requests_own_first_block() -> None:
    assert build([(1, 0), (1, 11)]).block_tables.tolist() == [[100, 100, 100], [101, 102, 103]]


def test_less_than_a_third_of_a_decode_group_is_padding() -> None:
    metadata = build([(1, context) for context in range(0, 4000, 37)])

    for group in metadata.decode_groups:
        needed = torch.clamp(-(-group.seq_lens // 4), min=8)
        assert (3 * needed >= 2 * group.block_ids.shape[1]).all()
    assert sorted(torch.cat([group.rows for group in metadata.decode_groups]).tolist()) == list(range(109))


def test_decodes_of_similar_length_share_a_group() -> None:
    assert len(build([(1, context) for context in range(100, 140)]).decode_groups) == 1


def test_a_chunk_is_cut_into_pieces_that_see_no_more_blocks_than_they_need() -> None:
    pieces = build([(1000, 10)]).chunk_pieces

    assert [(piece.start, piece.query_len, piece.context_len) for piece in pieces] == [(0, 512, 10), (512, 488, 522)]
    assert [len(piece.block_ids) for piece in pieces] == [131, 253]


def test_blocks_that_hold_no_token_yet_are_not_looked_at() -> None:
    layout = StepLayout(
        query_lens=np.array([1, 1]),
        context_lens=np.array([2, 9]),
        block_tables=np.array([7, 8, 9, 4, 5, 6]),
        num_blocks=np.array([3, 3]),
        block_size=4,
    )

    assert layout.block_tables.tolist() == [[7, 7, 7], [4, 5, 6]]
