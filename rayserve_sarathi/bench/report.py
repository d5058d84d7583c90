"""The figures of a load, as a table and as JSON."""

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path

import numpy as np

from rayserve_sarathi.bench.machine import describe_machine
from rayserve_sarathi.bench.outcome import Outcome
from rayserve_sarathi.bench.summary import Distribution, Figure, Summary
from rayserve_sarathi.simulation.report import write_json

_LABELS = {
    "ttft": "TTFT",
    "tbt": "TBT, every gap",
    "itl": "ITL, between chunks",
    "tpot": "TPOT, mean gap",
    "normalised_latency": "latency / token",
    "e2el": "to the last token",
    "send_delay": "sent late by",
}
_WIDTH = 22
_LATE_MS = 50.0


def write_figures(path: Path, figures: Mapping[str, Figure]) -> None:
    """Write figures as JSON, with date and machine; raises ConfigError if the file cannot be written."""
    date = datetime.now(UTC).isoformat(timespec="seconds")
    write_json(path, {"date": date, "machine": describe_machine(), **figures})


def detail(outcomes: Sequence[Outcome]) -> dict[str, Figure]:
    """Return the figures of each request, failed ones too, by the names of `vllm bench serve`; times are in seconds."""
    start_s = min((outcome.sent_s for outcome in outcomes), default=0.0)
    return {
        "start_times": [outcome.sent_s - start_s for outcome in outcomes],
        "input_lens": [outcome.num_prompt_tokens for outcome in outcomes],
        "output_lens": [outcome.num_output_tokens for outcome in outcomes],
        "ttfts": [outcome.ttft_s if outcome.token_times_s else None for outcome in outcomes],
        "itls": [np.diff(np.unique(outcome.token_times_s)).tolist() for outcome in outcomes],
        "tbts": [np.diff(outcome.token_times_s).tolist() for outcome in outcomes],
        "errors": ["" if outcome.failure is None else _failure_text(outcome) for outcome in outcomes],
    }


def render(summary: Summary, outcomes: Sequence[Outcome]) -> str:
    """Return the figures for a terminal, with what to be wary of."""
    return "".join(f"{line}\n" for line in (*_rates(summary), "", *_table(summary), *_warnings(summary, outcomes)))


def _rates(summary: Summary) -> Iterator[str]:
    seconds = summary.duration_s
    yield f"{'requests':{_WIDTH}}{summary.num_completed} complete, {summary.num_failed} failed in {seconds:.2f} s"
    yield (
        f"{'throughput':{_WIDTH}}{summary.num_completed / seconds:.3g} requests/s,"
        f" {summary.num_output_tokens / seconds:.1f} output tokens/s (most in a second:"
        f" {summary.max_output_tokens_per_s}), {summary.num_input_tokens / seconds:.1f} input tokens/s"
    )
    yield f"{'open at a time':{_WIDTH}}at most {summary.max_concurrent_requests} requests"
    if summary.num_good is not None:
        num_sent = summary.num_completed + summary.num_failed
        share = summary.num_good / num_sent if num_sent else 0.0
        yield f"{'goodput':{_WIDTH}}{summary.num_good / seconds:.3g} requests/s, {share:.1%} of all within the targets"


def _table(summary: Summary) -> Iterator[str]:
    known = {name: summary.distributions[name] for name in _LABELS}
    percentiles = next((found.percentiles for found in known.values() if found is not None), {})
    columns = ["mean", *(f"p{percentile:g}" for percentile in percentiles), "max"]
    yield f"{'ms':{_WIDTH}}" + "".join(f"{column:>11}" for column in columns)
    for name, distribution in known.items():
        yield f"{_LABELS[name]:{_WIDTH}}" + "".join(f"{text:>11}" for text in _cells(distribution, len(columns)))


def _cells(distribution: Distribution | None, num_columns: int) -> list[str]:
    if distribution is None:
        return ["-"] * num_columns
    values = (distribution.mean, *distribution.percentiles.values(), distribution.max)
    return [f"{value:.2f}" for value in values]


def _warnings(summary: Summary, outcomes: Sequence[Outcome]) -> Iterator[str]:
    for label, number in summary.failures.items():
        example = next(
            outcome for outcome in outcomes if outcome.failure is not None and outcome.failure.label == label
        )
        yield f"failed: {number} x {_failure_text(example)}"
    if summary.num_short:
        yield f"{summary.num_short} requests ended with fewer tokens than were asked for"
    if summary.num_without_usage:
        yield f"{summary.num_without_usage} streams told no number of tokens; each chunk was counted as one"
    late = summary.distributions["send_delay"]
    if late is not None and late.max > _LATE_MS:
        yield (
            f"requests went out up to {late.max:.0f} ms late (mean {late.mean:.0f} ms): this client lacked CPU,"
            " and times are no more exact than that"
        )


def _failure_text(outcome: Outcome) -> str:
    failure = outcome.failure
    assert failure is not None
    retry = "" if failure.retry_after_s is None else f" (retry after {failure.retry_after_s:g} s)"
    return f"{failure.label}: {failure.message}{retry}"
