"""When a run keeps up, and when it is certain that it will not."""

import numpy as np
import pytest

from rayserve_sarathi.simulation.criteria import Criteria, Watch, most_long_gaps


@pytest.mark.parametrize("num_gaps", [0, 1, 2, 99, 100, 101, 102, 1000, 12_345])
def test_as_many_gaps_may_be_long_as_leave_the_quantile_below_the_limit(num_gaps: int):
    def p99(num_long: int) -> float:
        return float(np.quantile([0.0] * (num_gaps - num_long) + [1.0] * num_long, 0.99))

    most = most_long_gaps(num_gaps)

    if num_gaps:
        assert p99(most) < 1.0
    if most < num_gaps:
        assert p99(most + 1) == 1.0


def test_a_run_without_gaps_is_not_hopeless():
    watch = Watch(Criteria(p99_tbt_s=0.1), [0.0, 1.0], num_gaps=0)

    assert not watch.is_hopeless(0, now_s=0.5)
    assert watch.is_hopeless(0, now_s=4.0)  # more than half have waited for more than 2 s
