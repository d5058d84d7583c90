"""Between measured points and beyond them: curves of one size, and attention over sizes and contexts."""

from bisect import bisect_left
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from rayserve_sarathi.simulation.profile_files import Point

_Floats = npt.NDArray[np.float64]

_GRID_TOKENS = 32
_MIN_POINTS_OF_SLOPE = 4
_TILE_TOKENS = 128


class Curve:
    """Times by size: linear between points, constant before the first, and from the last on as steep as the last half.

    Args:
        points: In order of size.
    """

    def __init__(self, points: Sequence[Point]) -> None:
        assert points, "a curve needs a point"
        self._sizes = [point.size for point in points]
        self._times_s = [point.time_s for point in points]
        middle = len(points) // 2
        rise_s, run = self._times_s[-1] - self._times_s[middle], self._sizes[-1] - self._sizes[middle]
        self._last_slope_s = max(0.0, rise_s / run) if run else 0.0

    def at(self, size: float) -> float:
        """Return the time of a size."""
        index = bisect_left(self._sizes, size)
        if index == len(self._sizes):
            return self._times_s[-1] + (size - self._sizes[-1]) * self._last_slope_s
        if index == 0:
            return self._times_s[0]
        low, high = self._sizes[index - 1], self._sizes[index]
        share = (size - low) / (high - low)
        return self._times_s[index - 1] + share * (self._times_s[index] - self._times_s[index - 1])

    def at_tile(self, size: int, tile_tokens: int = _TILE_TOKENS) -> float:
        """Return the time of the next measured size, where it is within a tile, as a matrix product pads its rows."""
        index = bisect_left(self._sizes, size)
        if index < len(self._sizes) and self._sizes[index] - size < tile_tokens:
            return self._times_s[index]
        return self.at(size)


class DecodeTable:
    """Attention of decodes by their number and mean context, linear in both and beyond.

    The work of a step's decodes is spread over KV heads and requests alike: 2n requests with half of the KV heads of a
    rank keep a device as busy as n requests with all. So for a model with other KV heads than the profile's, it is the
    number of requests that is scaled, which leaves the least time of a kernel as it is.

    Args:
        points: Number of requests, context of each.
        scale: KV of a token, relative to the profile's.
    """

    def __init__(self, points: Sequence[Point], *, scale: float) -> None:
        self._scale = scale
        sizes, grid, rows = _rows_on_grid(points)
        self._max_size = sizes[-1]
        every = np.arange(self._max_size + 1)
        columns = [np.interp(every, sizes, rows[:, column]) for column in range(rows.shape[1])]
        rows_by_size: list[list[float]] = np.stack(columns, axis=1).tolist()
        self._rows = rows_by_size
        self._last = len(grid) - 1
        self._first_len, self._last_len = float(grid[0]), float(grid[-1])
        # As steep as the second half, which is less noisy than the last two points.
        middle = len(grid) // 2
        run = max(1.0, self._last_len - float(grid[middle]))
        self._slopes = [max(0.0, (row[-1] - row[middle]) / run) for row in self._rows]

    def at(self, num_decodes: int, context_tokens: float) -> float:
        """Return the time of decodes with so many context tokens together."""
        mean = context_tokens / num_decodes
        size = num_decodes * self._scale
        if size >= self._max_size:
            return size / self._max_size * self._row_at(self._max_size, mean)
        low = int(size)
        share = size - low
        if share == 0:
            return self._row_at(low, mean)
        return (1 - share) * self._row_at(low, mean) + share * self._row_at(low + 1, mean)

    def _row_at(self, size: int, context_len: float) -> float:
        row = self._rows[size]
        position = (context_len - self._first_len) / _GRID_TOKENS
        index = int(position)
        if index >= self._last:
            return row[-1] + (context_len - self._last_len) * self._slopes[size]
        if position <= 0:
            return row[0]
        return row[index] + (position - index) * (row[index + 1] - row[index])


class ChunkTable:
    """Attention of chunks by their size and context, linear in both; times are in proportion to the work.

    Beyond the measured contexts a chunk's time goes on as a straight line through what was measured of it; one with too
    few contexts has the slope per token of the larger chunks that have enough. A chunk larger than any measured one is
    as several of that size, each the context of those after it: the same pairs of query and key.

    Args:
        points: Size of the chunk, its context.
        scale: FLOPs of a pair, relative to the profile's.
    """

    def __init__(self, points: Sequence[Point], *, scale: float) -> None:
        self._scale = scale
        by_size: dict[int, list[Point]] = {}
        for point in points:
            by_size.setdefault(point.size, []).append(point)
        self._sizes = sorted(by_size)
        self._max_size = self._sizes[-1]
        last = max(point.context_len for point in points)
        self._last = max(1, -(-last // _GRID_TOKENS))
        grid: _Floats = np.arange(self._last + 1, dtype=np.float64) * _GRID_TOKENS
        slopes = _slopes(by_size)
        self._measured = {size: _extended(by_size[size], slopes[size], grid) for size in self._sizes}
        self._slopes = slopes
        self._rows: dict[int, tuple[list[float], float]] = {}

    def at(self, query_len: int, context_len: int) -> float:
        """Return the time of a chunk."""
        seconds = 0.0
        while query_len > self._max_size:
            seconds += self._row_at(self._max_size, context_len)
            query_len -= self._max_size
            context_len += self._max_size
        return seconds + self._row_at(query_len, context_len)

    def _row_at(self, size: int, context_len: int) -> float:
        if (known := self._rows.get(size)) is None:
            known = self._rows[size] = self._row_of(size)
        row, slope = known
        index, rest = divmod(context_len, _GRID_TOKENS)
        if index >= self._last:
            return row[-1] + (context_len - self._last * _GRID_TOKENS) * slope
        return row[index] + rest / _GRID_TOKENS * (row[index + 1] - row[index])

    def _row_of(self, size: int) -> tuple[list[float], float]:
        index = bisect_left(self._sizes, size)
        high = self._sizes[index]
        low = self._sizes[index - 1] if index else high
        share = (size - low) / (high - low) if size > low else 0.0
        row = (1 - share) * self._measured[low] + share * self._measured[high]
        slope = (1 - share) * self._slopes[low] + share * self._slopes[high]
        values: list[float] = (row * self._scale).tolist()
        return values, slope * self._scale


def _rows_on_grid(points: Sequence[Point]) -> tuple[list[int], _Floats, _Floats]:
    """Return the sizes, contexts at even distances, and the times of each size at them, [sizes + 1 for 0, contexts]."""
    by_size: dict[int, list[Point]] = {0: [Point(0, point.context_len, 0.0) for point in points[:1]]}
    for point in points:
        by_size.setdefault(point.size, []).append(point)
    contexts = [point.context_len for point in points]
    grid = np.arange(min(contexts), max(contexts) + _GRID_TOKENS, _GRID_TOKENS, dtype=np.float64)
    sizes = sorted(by_size)
    rows = np.stack(
        [
            np.interp(grid, [point.context_len for point in by_size[size]], [point.time_s for point in by_size[size]])
            for size in sizes
        ]
    )
    rows[0] = rows[1]  # the least time of a kernel
    return sizes, grid, rows


def _slopes(by_size: dict[int, list[Point]]) -> dict[int, float]:
    """Return by how much a token more of context lengthens a chunk of each size."""
    lines: dict[int, float] = {}
    for size, points in by_size.items():
        contexts = [point.context_len for point in points]
        # A short span says little about the slope.
        if len(points) >= _MIN_POINTS_OF_SLOPE and 4 * (contexts[-1] - contexts[0]) >= size:
            lines[size] = max(0.0, float(np.polyfit(contexts, [point.time_s for point in points], 1)[0]))
    if not lines:
        return dict.fromkeys(by_size, 0.0)
    largest = sorted(lines)[-_MIN_POINTS_OF_SLOPE:]
    per_query = float(np.median([lines[size] / size for size in largest]))
    return {size: lines.get(size, size * per_query) for size in by_size}


def _extended(points: Sequence[Point], slope: float, grid: _Floats) -> _Floats:
    contexts = np.array([point.context_len for point in points], dtype=np.float64)
    times = np.array([point.time_s for point in points])
    beyond = np.maximum(grid - contexts[-1], 0.0)
    row: _Floats = np.interp(grid, contexts, times) + beyond * slope
    return row
