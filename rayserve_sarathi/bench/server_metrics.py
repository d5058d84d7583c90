"""What a server itself measures of its queue: the time from a request's arrival to its first step.

The scheduling delay of the paper (section 5). It is read from the histogram `..._request_queue_time_seconds` that vLLM
and this package show on `/metrics`, as the difference of two readings.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from prometheus_client.parser import text_string_to_metric_families

_QUEUE_TIME = "request_queue_time_seconds"


@dataclass(frozen=True, slots=True, kw_only=True)
class Buckets:
    """A histogram: how many values there were up to each bound. The last bound is infinite."""

    cumulative: Mapping[float, float]

    @property
    def count(self) -> float:
        """How many values there were."""
        return max(self.cumulative.values(), default=0.0)

    def since(self, earlier: "Buckets") -> "Buckets":
        """Return the values that have come since an earlier reading."""
        return Buckets(
            cumulative={bound: count - earlier.cumulative.get(bound, 0.0) for bound, count in self.cumulative.items()}
        )

    def quantile(self, share: float) -> float:
        """Return the value below which a share of the values lies, taken to be spread evenly within a bucket.

        A quantile beyond the last finite bound is infinite. There must be values.
        """
        rank = share * self.count
        lower, below = 0.0, 0.0
        for bound, count in sorted(self.cumulative.items()):
            if count >= rank and count > below:
                return lower + (bound - lower) * (rank - below) / (count - below)
            lower, below = bound, count
        raise AssertionError(f"no values in {self.cumulative}")


def read_queue_times(text: str) -> Buckets | None:
    """Return the histogram of queue times of all pipelines together; None if the server shows none.

    Args:
        text: Metrics in Prometheus's text format.
    """
    cumulative: dict[float, float] = {}
    try:
        families = list(text_string_to_metric_families(text))
    except ValueError:  # some other text
        return None
    for family in families:
        if not family.name.endswith(_QUEUE_TIME):
            continue
        for sample in family.samples:
            if sample.name.endswith("_bucket"):
                bound = float(sample.labels["le"])
                cumulative[bound] = cumulative.get(bound, 0.0) + sample.value
    return Buckets(cumulative=cumulative) if cumulative else None
