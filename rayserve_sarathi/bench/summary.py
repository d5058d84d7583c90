"""Figures of a whole load, from what became of its requests.

Names are those that `vllm bench serve` writes, so that its tools read them: `itl` is the time between two chunks that
bring tokens, `tpot` a request's mean time per token after the first, `e2el` the time to the last token. Ours are `tbt`,
every gap between two tokens of a request (0 where they came together), and `normalised_latency`, the time to the last
token per output token. Latencies are those of complete requests; failed ones are counted by kind.
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeAlias

import numpy as np

from rayserve_sarathi.bench.goodput import Targets
from rayserve_sarathi.bench.outcome import Outcome

Figure: TypeAlias = "float | int | str | Sequence[Figure] | Mapping[str, Figure] | None"
Values = np.ndarray[tuple[int], np.dtype[np.float64]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Distribution:
    """A set of times, in milliseconds. Percentiles between two values are interpolated."""

    mean: float
    median: float
    std: float
    max: float
    percentiles: Mapping[float, float]

    @classmethod
    def of(cls, values_s: Values, percentiles: Sequence[float]) -> "Distribution | None":
        """Describe times in seconds; None if there are none."""
        if not len(values_s):
            return None
        values_ms = 1e3 * values_s
        return cls(
            mean=float(values_ms.mean()),
            median=float(np.median(values_ms)),
            std=float(values_ms.std()),
            max=float(values_ms.max()),
            percentiles={
                percentile: float(value)
                for percentile, value in zip(percentiles, np.percentile(values_ms, percentiles), strict=True)
            },
        )

    def to_json(self, name: str) -> dict[str, Figure]:
        """Return the fields of `vllm bench serve`, such as `p99_ttft_ms`, and the largest."""
        return {
            f"mean_{name}_ms": self.mean,
            f"median_{name}_ms": self.median,
            f"std_{name}_ms": self.std,
            **{f"p{percentile:g}_{name}_ms": value for percentile, value in self.percentiles.items()},
            f"max_{name}_ms": self.max,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Summary:
    """Figures of a whole load."""

    duration_s: float
    num_completed: int
    num_good: int | None
    """Requests that met the targets; None if there were none."""
    num_input_tokens: int
    """Of complete requests, as are the output tokens."""
    num_output_tokens: int
    failures: Mapping[str, int]
    """Failed requests by kind, such as `status 429`."""
    num_short: int
    """Complete requests with fewer tokens than they asked for."""
    num_without_usage: int
    """Complete requests whose server told no number of tokens, so that chunks were counted."""
    max_output_tokens_per_s: int
    """Most tokens in one second."""
    max_concurrent_requests: int
    distributions: Mapping[str, Distribution | None]
    """By name: ttft, tpot, itl, e2el, tbt, normalised_latency, and send_delay: how late the client itself was."""

    @property
    def num_failed(self) -> int:
        """Requests without a complete answer."""
        return sum(self.failures.values())

    def to_json(self) -> dict[str, Figure]:
        """Return all as one flat object."""
        tokens = self.num_input_tokens + self.num_output_tokens
        figures: dict[str, Figure] = {
            "duration": self.duration_s,
            "completed": self.num_completed,
            "failed": self.num_failed,
            "failures": self.failures,
            "total_input_tokens": self.num_input_tokens,
            "total_output_tokens": self.num_output_tokens,
            "request_throughput": self.num_completed / self.duration_s,
            "request_goodput": None if self.num_good is None else self.num_good / self.duration_s,
            "output_throughput": self.num_output_tokens / self.duration_s,
            "total_token_throughput": tokens / self.duration_s,
            "max_output_tokens_per_s": self.max_output_tokens_per_s,
            "max_concurrent_requests": self.max_concurrent_requests,
            "num_short": self.num_short,
            "num_without_usage": self.num_without_usage,
        }
        for name, distribution in self.distributions.items():
            if distribution is not None:
                figures |= distribution.to_json(name)
        return figures


def summarise(
    outcomes: Sequence[Outcome], *, duration_s: float, percentiles: Sequence[float], targets: Targets | None = None
) -> Summary:
    """Return the figures of a load.

    Args:
        outcomes: Of every request that was sent.
        duration_s: From the first request to the last end.
        percentiles: Which, 0 to 100, beside the median.
        targets: What goodput counts; None counts none.
    """
    complete = [outcome for outcome in outcomes if outcome.failure is None]
    return Summary(
        duration_s=duration_s,
        num_completed=len(complete),
        num_good=None if targets is None else sum(map(targets.are_met, complete)),
        num_input_tokens=sum(outcome.num_prompt_tokens for outcome in complete),
        num_output_tokens=sum(outcome.num_output_tokens for outcome in complete),
        failures=dict(Counter(outcome.failure.label for outcome in outcomes if outcome.failure is not None)),
        num_short=sum(outcome.num_output_tokens < outcome.num_tokens_asked for outcome in complete),
        num_without_usage=sum(not outcome.has_usage for outcome in complete),
        max_output_tokens_per_s=_most_in_a_second(complete),
        max_concurrent_requests=_most_open(outcomes),
        distributions={
            name: Distribution.of(_values(take(outcome) for outcome in complete), percentiles)
            for name, take in _TIMES.items()
        }
        | {
            "send_delay": Distribution.of(
                _values([outcome.sent_s - outcome.due_s] for outcome in outcomes), percentiles
            )
        },
    )


def gaps_s(outcomes: Sequence[Outcome]) -> Values:
    """Return every gap between two tokens of a complete request, in seconds."""
    return _values(np.diff(outcome.token_times_s) for outcome in outcomes if outcome.failure is None)


def _tpot(outcome: Outcome) -> Sequence[float]:
    num_gaps = len(outcome.token_times_s) - 1
    return [(outcome.e2e_s - outcome.ttft_s) / num_gaps] if num_gaps else []


_TIMES: Mapping[str, Callable[[Outcome], "Sequence[float] | Values"]] = {
    "ttft": lambda outcome: [outcome.ttft_s],
    "tpot": _tpot,
    "itl": lambda outcome: np.diff(np.unique(outcome.token_times_s)),
    "e2el": lambda outcome: [outcome.e2e_s],
    "tbt": lambda outcome: np.diff(outcome.token_times_s),
    "normalised_latency": lambda outcome: [outcome.e2e_s / len(outcome.token_times_s)],
}
"""What each distribution takes of one request."""


def _values(parts: "Iterable[Sequence[float] | Values]") -> Values:
    return np.concatenate([np.empty(0), *(np.asarray(part, dtype=np.float64) for part in parts)])


def _most_in_a_second(outcomes: Sequence[Outcome]) -> int:
    """Return the most tokens in one of the seconds since the first request was sent."""
    times_s = _values(outcome.token_times_s for outcome in outcomes)
    if not len(times_s):
        return 0
    start_s = min(outcome.sent_s for outcome in outcomes)
    return int(np.bincount((times_s - start_s).astype(np.int64)).max())


def _most_open(outcomes: Sequence[Outcome]) -> int:
    """Return the most requests that were open at a time."""
    # At equal times the end comes first.
    changes = sorted([(outcome.sent_s, 1) for outcome in outcomes] + [(outcome.end_s, -1) for outcome in outcomes])
    return int(np.cumsum([change for _, change in changes]).max()) if changes else 0
