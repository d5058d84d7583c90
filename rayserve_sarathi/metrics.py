"""What the scheduler counts, in plain numbers; rendered in Prometheus's text format on demand.

Values are observed in batches (one call a step, not one a token), which prometheus_client's own histograms cannot do;
its exposition is used as it is.
"""

from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from operator import attrgetter

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from rayserve_sarathi.stage_times import StageTotals

_PREFIX = "sarathi_"
_LABELS = ("model_name", "pipeline")
SECONDS_BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.2, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_RATIOS = (0.25, 0.5, 0.7, 0.8, 0.9, 0.95, 1.0, 1.05, 1.1, 1.2, 1.5, 2.0, 4.0)
_TOKENS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192)


class Histogram:
    """Counts of values up to each bound."""

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self._counts = [0] * (len(bounds) + 1)
        self._sum = 0.0

    @property
    def count(self) -> int:
        """How many values were observed."""
        return sum(self._counts)

    def observe(self, value: float) -> None:
        """Count one value."""
        self.observe_repeated(value, 1)

    def observe_all(self, values: Sequence[float]) -> None:
        """Count many values; those of one step are mostly equal, so each different one is looked up once."""
        if values and values.count(values[0]) == len(values):
            self.observe_repeated(values[0], len(values))
            return
        for value, count in Counter(values).items():
            self.observe_repeated(value, count)

    def observe_repeated(self, value: float, count: int) -> None:
        """Count `count` equal values."""
        self._counts[bisect_left(self._bounds, value)] += count
        self._sum += value * count

    def buckets(self) -> list[tuple[str, float]]:
        """Return Prometheus's cumulative buckets."""
        total, buckets = 0, []
        for bound, count in zip((*map(str, map(float, self._bounds)), "+Inf"), self._counts, strict=True):
            total += count
            buckets.append((bound, float(total)))
        return buckets

    @property
    def sum(self) -> float:
        """Sum of the values."""
        return self._sum


def _seconds() -> Histogram:
    return Histogram(SECONDS_BOUNDS)


@dataclass(eq=False)
class SchedulerMetrics:
    """Counters and histograms of one scheduler, which owns them.

    started = finished (all reasons) + running + waiting, at any time.
    """

    num_started: int = 0
    num_finished: dict[str, int] = field(default_factory=dict)
    """By finish reason."""
    num_preemptions: int = 0
    num_recomputed_tokens: int = 0
    """Tokens that were lost with a preemption or a restart, and not found in the prefix cache again."""
    num_stage_restarts: Counter[str] = field(default_factory=Counter)
    """By reason; see `PipelineFaultError`."""
    num_prompt_tokens: int = 0
    num_generation_tokens: int = 0
    num_prefix_cache_queries: int = 0
    """Tokens looked up in the prefix cache."""
    num_prefix_cache_hits: int = 0
    """Tokens found there."""
    time_to_first_token_s: Histogram = field(default_factory=_seconds)
    inter_token_latency_s: Histogram = field(default_factory=_seconds)
    e2e_request_latency_s: Histogram = field(default_factory=_seconds)
    request_queue_time_s: Histogram = field(default_factory=_seconds)
    request_prefill_time_s: Histogram = field(default_factory=_seconds)
    request_decode_time_s: Histogram = field(default_factory=_seconds)
    iteration_tokens: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    num_tbt_slo_violations: Counter[str] = field(default_factory=Counter)
    """Gaps between tokens above the target, by cause; see `scheduling.late_tokens`."""
    step_time_prediction_error: Histogram = field(default_factory=lambda: Histogram(_RATIOS))
    """Time of a step over what was predicted; observed where there is a target or the budget is `auto`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerState:
    """Where a scheduler stands now."""

    num_requests_running: int
    num_requests_waiting: int
    kv_cache_usage: float
    prefill_backlog_tokens: int
    num_steps_in_flight: int
    token_budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """The metrics of one pipeline at one moment."""

    model_name: str
    pipeline: str
    metrics: SchedulerMetrics
    state: SchedulerState
    stages: tuple[StageTotals, ...] = ()
    """Of each stage; none before the first step."""


def render(snapshots: Sequence[Snapshot]) -> str:
    """Return the metrics of all pipelines in Prometheus's text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_SnapshotCollector(snapshots))
    return generate_latest(registry).decode()


class _SnapshotCollector(Collector):
    def __init__(self, snapshots: Sequence[Snapshot]) -> None:
        self._snapshots = snapshots

    def collect(self) -> Iterator[Metric]:
        yield self._gauge("num_requests_running", "Running", lambda s: s.state.num_requests_running)
        yield self._gauge("num_requests_waiting", "Waiting", lambda s: s.state.num_requests_waiting)
        yield self._gauge("kv_cache_usage_perc", "Share of KV blocks in use, 0 to 1", lambda s: s.state.kv_cache_usage)
        yield self._gauge("prefill_backlog_tokens", "Tokens to prefill", lambda s: s.state.prefill_backlog_tokens)
        yield self._gauge("num_steps_in_flight", "Steps not returned", lambda s: s.state.num_steps_in_flight)
        yield self._gauge("token_budget", "Most tokens in a step", lambda s: s.state.token_budget)
        yield self._counter("request_started", "Requests accepted", lambda s: s.metrics.num_started)
        yield self._by_label("request_success", "Requests ended", "finished_reason", attrgetter("num_finished"))
        yield self._by_label(
            "stage_restarts", "Times that a pipeline was rebuilt", "reason", attrgetter("num_stage_restarts")
        )
        yield self._by_label(
            "tbt_slo_violations", "Gaps between tokens above the target", "cause", attrgetter("num_tbt_slo_violations")
        )
        yield self._counter("num_preemptions", "Requests preempted", lambda s: s.metrics.num_preemptions)
        yield self._counter("recomputed_tokens", "Tokens computed again", lambda s: s.metrics.num_recomputed_tokens)
        yield self._counter("prompt_tokens", "Computed or found in the cache", lambda s: s.metrics.num_prompt_tokens)
        yield self._counter("generation_tokens", "Tokens generated", lambda s: s.metrics.num_generation_tokens)
        yield self._counter("prefix_cache_queries", "Tokens looked up", lambda s: s.metrics.num_prefix_cache_queries)
        yield self._counter("prefix_cache_hits", "Tokens found", lambda s: s.metrics.num_prefix_cache_hits)
        yield self._stage_seconds()
        yield self._bubble_share()
        for name, text, histogram in (
            ("time_to_first_token_seconds", "Arrival to first token", "time_to_first_token_s"),
            ("inter_token_latency_seconds", "Between two tokens", "inter_token_latency_s"),
            ("e2e_request_latency_seconds", "Arrival to end", "e2e_request_latency_s"),
            ("request_queue_time_seconds", "Arrival to first step", "request_queue_time_s"),
            ("request_prefill_time_seconds", "First step to first token", "request_prefill_time_s"),
            ("request_decode_time_seconds", "First token to end", "request_decode_time_s"),
            ("iteration_tokens_total", "Tokens in a step", "iteration_tokens"),
            ("step_time_prediction_error_ratio", "Time of a step over its prediction", "step_time_prediction_error"),
        ):
            yield self._histogram(name, text, attrgetter(histogram))

    def _gauge(self, name: str, text: str, value: Callable[[Snapshot], float]) -> Metric:
        family = GaugeMetricFamily(_PREFIX + name, text, labels=_LABELS)
        for snapshot in self._snapshots:
            family.add_metric(_labels(snapshot), value(snapshot))
        return family

    def _counter(self, name: str, text: str, value: Callable[[Snapshot], float]) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, text, labels=_LABELS)
        for snapshot in self._snapshots:
            family.add_metric(_labels(snapshot), value(snapshot))
        return family

    def _by_label(
        self, name: str, text: str, label: str, counts: Callable[[SchedulerMetrics], Mapping[str, int]]
    ) -> Metric:
        family = CounterMetricFamily(_PREFIX + name, text, labels=[*_LABELS, label])
        for snapshot in self._snapshots:
            for value, count in sorted(counts(snapshot.metrics).items()):
                family.add_metric([*_labels(snapshot), value], count)
        return family

    def _stage_seconds(self) -> Metric:
        text = "What stages did while a step was in flight"
        family = CounterMetricFamily(_PREFIX + "step_time_seconds", text, labels=[*_LABELS, "stage", "kind"])
        for snapshot in self._snapshots:
            for index, stage in enumerate(snapshot.stages):
                for kind, seconds in (("busy", stage.busy_s), ("bubble", stage.bubble_s), ("comm", stage.comm_s)):
                    family.add_metric([*_labels(snapshot), str(index), kind], seconds)
        return family

    def _bubble_share(self) -> Metric:
        text = "Share of the last 10 to 20 seconds with a step in flight that a stage waited, 0 to 1"
        family = GaugeMetricFamily(_PREFIX + "bubble_share", text, labels=[*_LABELS, "stage"])
        for snapshot in self._snapshots:
            for index, stage in enumerate(snapshot.stages):
                family.add_metric([*_labels(snapshot), str(index)], stage.recent_bubble_share)
        return family

    def _histogram(self, name: str, text: str, value: Callable[[SchedulerMetrics], Histogram]) -> Metric:
        family = HistogramMetricFamily(_PREFIX + name, text, labels=_LABELS)
        for snapshot in self._snapshots:
            histogram = value(snapshot.metrics)
            family.add_metric(_labels(snapshot), histogram.buckets(), histogram.sum)
        return family


def _labels(snapshot: Snapshot) -> list[str]:
    return [snapshot.model_name, snapshot.pipeline]
