"""Counted gaps have the quantiles of the gaps one by one."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rayserve_sarathi.simulation.gaps import GapLog, Gaps

counted = st.lists(st.tuples(st.floats(0, 100), st.integers(1, 50)), min_size=1, max_size=30)


@given(gaps=counted, share=st.floats(0, 1))
def test_quantiles_are_those_of_numpy(gaps: list[tuple[float, int]], share: float):
    log = GapLog(limit_s=50.0)
    for value, count in gaps:
        log.observe_repeated(value, count)
    singles = np.repeat([value for value, _ in gaps], [count for _, count in gaps])

    assert log.gaps().quantile(share) == pytest.approx(np.quantile(singles, share), rel=1e-9, abs=1e-9)
    assert log.gaps().share_within(50.0) == pytest.approx((singles <= 50.0).mean())
    assert log.gaps().mean == pytest.approx(singles.mean())
    assert log.gaps().max == singles.max()
    assert log.num_above == (singles > 50.0).sum()
    assert len(log.gaps()) == log.count == len(singles)


def test_without_gaps_there_is_nothing_to_wait_for():
    gaps = Gaps(np.zeros(0), np.zeros(0, dtype=np.int64))

    assert (gaps.quantile(0.99), gaps.share_within(0.1), gaps.mean, gaps.max) == (0.0, 1.0, 0.0, 0.0)
