import numpy as np

from rayserve_sarathi.execution.uniform import uniforms


def test_numbers_are_uniform_over_seeds_and_over_positions() -> None:
    for seeds, positions in (
        (np.arange(20000, dtype=np.uint64), np.full(20000, 7)),
        (np.full(20000, 7, dtype=np.uint64), np.arange(20000)),
    ):
        numbers = uniforms(seeds, positions)
        counts, _ = np.histogram(numbers, bins=20, range=(0, 1))

        assert numbers.min() >= 0 and numbers.max() < 1
        assert np.abs(counts - 1000).max() < 150
        assert abs(np.corrcoef(numbers[1:], numbers[:-1])[0, 1]) < 0.03


def test_numbers_do_not_change_from_release_to_release() -> None:
    seeds = np.array([0, 1, 2**64 - 1], dtype=np.uint64)

    assert uniforms(seeds, np.array([0, 1, 100000])).tolist() == [
        0.28176129772258496,
        0.36818951565166946,
        0.9583960035323584,
    ]


def test_neighbouring_seeds_are_not_the_same_sequence_shifted() -> None:
    first, second = (uniforms(np.full(1000, seed, np.uint64), np.arange(1000)) for seed in (1, 2))

    assert not set(first) & set(second)
