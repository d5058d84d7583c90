"""Between measured points and beyond them."""

import pytest

from rayserve_sarathi.simulation.interpolation import ChunkTable, Curve, DecodeTable
from rayserve_sarathi.simulation.profile_files import Point


def test_a_curve_is_linear_between_points_and_beyond_the_last():
    curve = Curve([Point(8, 0, 1.0), Point(16, 0, 2.0), Point(32, 0, 6.0)])

    assert curve.at(8) == 1.0
    assert curve.at(12) == 1.5
    assert curve.at(24) == 4.0
    assert curve.at(48) == 10.0
    assert curve.at(1) == 1.0


def test_a_matrix_product_costs_what_its_next_tile_does():
    curve = Curve([Point(256, 0, 1.0), Point(264, 0, 1.4), Point(1024, 0, 5.0)])

    assert curve.at_tile(256) == 1.0
    assert curve.at_tile(257) == 1.4
    assert curve.at_tile(1000) == 5.0
    assert curve.at_tile(644) == pytest.approx(3.2), "the next point is no tile of its own"


def test_one_point_is_a_constant():
    assert Curve([Point(8, 0, 1.0)]).at(1000) == 1.0


def decode_points() -> list[Point]:
    """Return times of 1 second, and a microsecond more for each token of context."""
    return [Point(size, context, 1 + 1e-6 * size * context) for size in (1, 2, 4, 8) for context in range(32, 1057, 32)]


def test_decodes_are_interpolated_by_number_and_mean_context():
    table = DecodeTable(decode_points(), scale=1)

    assert table.at(4, 4 * 64) == pytest.approx(1 + 256e-6)
    assert table.at(3, 3 * 100) == pytest.approx(1 + 300e-6)
    assert table.at(8, 8 * 4096) == pytest.approx(1 + 32768e-6), "beyond the last context"
    assert table.at(16, 16 * 64) == pytest.approx(2 * (1 + 512e-6)), "beyond the last number"


def test_more_kv_heads_are_as_more_decodes():
    assert DecodeTable(decode_points(), scale=2).at(3, 3 * 100) == pytest.approx(1 + 600e-6)
    assert DecodeTable(decode_points(), scale=0.5).at(4, 4 * 100) == pytest.approx(1 + 200e-6)
    assert DecodeTable(decode_points(), scale=0.25).at(1, 100) == pytest.approx(1 + 100e-6), "a kernel's least time"


def chunk_points(*, most: int = 1024) -> list[Point]:
    """Return a microsecond for each pair of query and key, not masked, where chunk and context have `most` tokens."""
    return [
        Point(size, context, 1e-6 * size * (context + size))
        for size in (64, 128, 256, 512, 1024)
        for context in range(0, most + 1 - size, 64)
    ]


def test_chunks_are_interpolated_by_size_and_context():
    table = ChunkTable(chunk_points(), scale=1)

    assert table.at(128, 256) == pytest.approx(1e-6 * 128 * 384)
    assert table.at(128, 300) == pytest.approx(1e-6 * 128 * 428)
    assert table.at(192, 0) == pytest.approx(1e-6 * (128 * 128 + 256 * 256) / 2)
    assert table.at(32, 0) == table.at(64, 0)
    assert ChunkTable(chunk_points(), scale=0.5).at(128, 256) == pytest.approx(table.at(128, 256) / 2)


def test_a_chunk_goes_on_as_a_line_beyond_the_measured_contexts():
    table = ChunkTable(chunk_points(), scale=1)

    assert table.at(256, 8192) == pytest.approx(1e-6 * 256 * 8448)
    # Of the largest there is but one measurement, and other chunks say how much context adds.
    assert table.at(1024, 8192) == pytest.approx(1e-6 * 1024 * 9216)


def test_a_chunk_larger_than_any_is_as_several():
    table = ChunkTable(chunk_points(), scale=1)

    assert table.at(2560, 100) == pytest.approx(table.at(1024, 100) + table.at(1024, 1124) + table.at(512, 2148))
