"""Times between tokens: how often each value occurred, as most of a step's are equal."""

from array import array

import numpy as np
import numpy.typing as npt

from rayserve_sarathi.metrics import SECONDS_BOUNDS, Histogram


class GapLog(Histogram):
    """The scheduler's own histogram of times between tokens, which also keeps the values.

    Args:
        limit_s: Gaps above it are counted in `num_above`.
    """

    def __init__(self, limit_s: float = float("inf")) -> None:
        super().__init__(SECONDS_BOUNDS)
        self._limit_s = limit_s
        self.num_above = 0
        self._values = array("d")
        self._repeats = array("q")

    def observe_repeated(self, value: float, count: int) -> None:
        """Count and keep `count` equal gaps."""
        super().observe_repeated(value, count)
        self._values.append(value)
        self._repeats.append(count)
        if value > self._limit_s:
            self.num_above += count

    def gaps(self) -> "Gaps":
        """Return what was observed."""
        return Gaps(np.array(self._values, dtype=np.float64), np.array(self._repeats, dtype=np.int64))


class Gaps:
    """Times between tokens with their numbers, sorted.

    Args:
        values: Seconds, [V].
        counts: How often each occurred, [V]; a value may be there more than once.
    """

    def __init__(self, values: npt.NDArray[np.float64], counts: npt.NDArray[np.int64]) -> None:
        order = np.argsort(values, kind="stable")
        self.values = values[order]
        self.counts = counts[order]
        self._ends = np.cumsum(self.counts)

    def __len__(self) -> int:
        return int(self._ends[-1]) if len(self._ends) else 0

    def quantile(self, share: float) -> float:
        """Return what `numpy.quantile` would of all gaps one by one; 0 without any."""
        if not len(self):
            return 0.0
        position = (len(self) - 1) * share
        below = int(position)
        low, high = (self._value_at(min(index, len(self) - 1)) for index in (below, below + 1))
        return low + (high - low) * (position - below)

    def share_within(self, limit_s: float) -> float:
        """Return the share of gaps of at most `limit_s`; 1 without any."""
        num_within = self.counts[: np.searchsorted(self.values, limit_s, side="right")].sum()
        return float(num_within) / len(self) if len(self) else 1.0

    @property
    def mean(self) -> float:
        """Average; 0 without any."""
        return float(self.values @ self.counts) / len(self) if len(self) else 0.0

    @property
    def max(self) -> float:
        """The longest; 0 without any."""
        return float(self.values[-1]) if len(self) else 0.0

    def _value_at(self, index: int) -> float:
        return float(self.values[np.searchsorted(self._ends, index, side="right")])
