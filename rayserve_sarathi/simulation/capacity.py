"""The largest rate at which a run keeps up: Sarathi-Serve's capacity (OSDI'24, section 5).

Who runs is left to the caller: a simulator, or a client of a server.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Generic, TypeVar

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.criteria import RunResult

Result = TypeVar("Result", bound=RunResult)


@dataclass(frozen=True, slots=True)
class Trial(Generic[Result]):
    """A run at one rate.

    Args:
        rate: Requests a second.
        result: What came of it.
        is_kept_up: Whether it met the criteria.
    """

    rate: float
    result: Result
    is_kept_up: bool


@dataclass(frozen=True, slots=True)
class Capacity(Generic[Result]):
    """What a search found.

    Args:
        rate: The largest rate that kept up, in requests a second; 0 if none did.
        best: The run at that rate; None if none kept up.
        trials: All runs, in the order in which they were made.
    """

    rate: float
    best: Trial[Result] | None
    trials: tuple[Trial[Result], ...]


def find_capacity(
    run: Callable[[float], Result],
    keeps_up: Callable[[Result], bool],
    *,
    first_rate: float = 1.0,
    min_rate: float = 0.01,
    max_rate: float = 10_000.0,
    tolerance: float = 0.025,
) -> Capacity[Result]:
    """Find the largest rate whose run keeps up.

    From `first_rate` on, rates are doubled or halved until one keeps up and another does not; then the interval between
    them is halved, in the middle of their ratio, until they differ by no more than `tolerance`.

    Args:
        run: Makes a run at a rate, in requests a second.
        keeps_up: Whether a run does, such as `Criteria.are_met`.
        first_rate: Where to begin; the closer, the fewer runs.
        min_rate: A system that does not keep up at this rate has no capacity.
        max_rate: Taken as the capacity of a system that keeps up at it.
        tolerance: Largest share by which the capacity may be too small.

    Raises:
        ConfigError: The rates are not in order, or the tolerance is not greater than 0.
    """
    if not 0 < min_rate <= first_rate <= max_rate:
        raise ConfigError(f"0 < min_rate <= first_rate <= max_rate is needed, got {min_rate}, {first_rate}, {max_rate}")
    if not tolerance > 0:
        raise ConfigError(f"tolerance must be greater than 0, got {tolerance}")
    trials: list[Trial[Result]] = []

    def try_rate(rate: float) -> bool:
        result = run(rate)
        trials.append(Trial(rate, result, keeps_up(result)))
        return trials[-1].is_kept_up

    if try_rate(first_rate):
        low, high = first_rate, 2 * first_rate
        while low < max_rate and try_rate(high := min(high, max_rate)):
            low, high = high, 2 * high
    else:
        low, high = first_rate / 2, first_rate
        while high > min_rate and not try_rate(low := max(low, min_rate)):
            low, high = low / 2, low
    if min_rate < high and low < max_rate:
        while high > low * (1 + tolerance):
            middle = float((low * high) ** 0.5)
            low, high = (middle, high) if try_rate(middle) else (low, middle)
    best = max((trial for trial in trials if trial.is_kept_up), key=lambda trial: trial.rate, default=None)
    return Capacity(0.0 if best is None else best.rate, best, tuple(trials))
