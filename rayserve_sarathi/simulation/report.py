"""The figures of a simulation, as nested numbers for JSON and as a table; its requests as Parquet."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.gaps import Gaps
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.workload import Float64Array

Figures = Mapping[str, "float | int | bool | Mapping[str, float] | Sequence[Mapping[str, float]]"]

_SHARES = {"p50": 0.5, "p90": 0.9, "p99": 0.99}
_COLUMNS = ("mean", *_SHARES, "max")
_ROWS = {
    "scheduling_delay_s": "scheduling delay",
    "ttft_s": "time to first token",
    "tbt_s": "time between tokens",
    "normalised_latency_s": "latency per token",
    "latency_s": "latency",
}


def write_json(path: Path, figures: Mapping[str, object]) -> None:
    """Write figures to a file.

    Raises:
        ConfigError: It cannot be written.
    """
    try:
        path.write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write the figures to {path}: {error.strerror or error}") from error


def write_parquet(path: Path, result: SimulationResult) -> None:
    """Write a row for each request, in order of arrival: when it came, what it waited for, and its tokens.

    Raises:
        ConfigError: It cannot be written, or pyarrow is not installed.
    """
    try:
        make_table, write = import_object("pyarrow:table"), import_object("pyarrow.parquet:write_table")
    except ImportError as error:
        raise ConfigError("--parquet needs pyarrow; pip install 'rayserve_sarathi[parquet]'") from error
    columns = {
        "arrival_s": result.arrivals_s,
        "scheduling_delay_s": result.scheduling_delay_s,
        "ttft_s": result.ttft_s,
        "latency_s": result.latency_s,
        "num_prompt_tokens": result.num_prompt_tokens,
        "num_output_tokens": result.num_output_tokens,
        "num_preemptions": result.num_preemptions,
    }
    try:
        write(make_table(columns), path)
    except OSError as error:
        raise ConfigError(f"cannot write the requests to {path}: {error.strerror or error}") from error


def summarise(result: SimulationResult) -> Figures:
    """Return the figures of a run; there must be a request that ended.

    Keys that end in `_s` are seconds: those of requests with their mean, 50th, 90th and 99th percentile and maximum.
    Rates are per second of the run.
    """
    duration_s = result.duration_s
    return {
        "num_requests": result.num_requests,
        "is_complete": result.is_complete,
        "duration_s": duration_s,
        "request_throughput": result.num_requests / duration_s,
        "output_token_throughput": int(result.num_output_tokens.sum()) / duration_s,
        "scheduling_delay_s": _percentiles(result.scheduling_delay_s),
        "ttft_s": _percentiles(result.ttft_s),
        "tbt_s": _percentiles_of_gaps(result.gaps),
        "normalised_latency_s": _percentiles(result.normalised_latency_s),
        "latency_s": _percentiles(result.latency_s),
        "num_preemptions": int(result.num_preemptions.sum()),
        "num_steps": result.num_steps,
        "tokens_per_step": result.num_batched_tokens / result.num_steps,
        "stages": [
            {"busy_s": stage.busy_s, "bubble_s": stage.bubble_s, "bubble_share": stage.bubble_share}
            for stage in result.stages
        ],
    }


def render_table(result: SimulationResult) -> str:
    """Return what `summarise` does as text for people."""
    figures = summarise(result)
    lines = [f"{'seconds':<20}" + "".join(f"{column:>11}" for column in _COLUMNS)]
    for key, title in _ROWS.items():
        values = figures[key]
        assert isinstance(values, Mapping)
        lines.append(f"{title:<20}" + "".join(f"{values[column]:>11.4f}" for column in _COLUMNS))
    bubbles = ", ".join(f"{stage.bubble_share:.1%}" for stage in result.stages)
    lines += [
        "",
        f"{result.num_requests} requests in {result.duration_s:.1f} s: {figures['request_throughput']:.3f} requests/s,"
        f" {figures['output_token_throughput']:.0f} output tokens/s",
        f"{result.num_steps} steps of {figures['tokens_per_step']:.0f} tokens;"
        f" {figures['num_preemptions']} preemptions; stages idle with a step in flight: {bubbles}",
    ]
    if not result.is_complete:
        lines.append("given up before its end: the criteria cannot be met any more")
    return "\n".join(lines) + "\n"


def _percentiles(values: Float64Array) -> dict[str, float]:
    quantiles = np.quantile(values, list(_SHARES.values())).tolist()
    return {
        "mean": float(values.mean()),
        **dict(zip(_SHARES, quantiles, strict=True)),
        "max": float(values.max()),
    }


def _percentiles_of_gaps(gaps: Gaps) -> dict[str, float]:
    quantiles = {name: gaps.quantile(share) for name, share in _SHARES.items()}
    return {"mean": gaps.mean, **quantiles, "max": gaps.max}
