"""What `sarathi capacity --url` does: find the largest rate that a running server keeps up with."""

import argparse
import asyncio
import math
import sys
from collections.abc import Iterator
from contextlib import AsyncExitStack, contextmanager

from rayserve_sarathi.bench.live_capacity import LiveMeasurement, LiveProbe
from rayserve_sarathi.bench.planned_load import draw_requests
from rayserve_sarathi.bench.report import write_figures
from rayserve_sarathi.bench.session import Session, loop_runner, open_session
from rayserve_sarathi.bench.summary import Figure
from rayserve_sarathi.simulation.capacity import Capacity, Trial, find_capacity
from rayserve_sarathi.simulation.criteria import Criteria


def run_capacity(arguments: argparse.Namespace) -> int:
    """Search, tell each run on stderr and the capacity on stdout; return the exit status.

    Args:
        arguments: Of `capacity_command.add_arguments`.

    Raises:
        ConfigError: An option is wrong, or there is no such server.
    """
    criteria = Criteria(p99_tbt_s=arguments.tbt, median_scheduling_delay_s=arguments.delay)
    with loop_runner() as runner, _opened(runner, arguments) as session:
        workload = draw_requests(arguments, rate=1.0, max_model_len=session.model.max_model_len)
        measurement = LiveMeasurement(session.client, session.prompts, workload, criteria=criteria)

        def run(rate: float) -> LiveProbe:
            probe = runner.run(measurement.measure(rate))
            sys.stderr.write(f"{_line(Trial(rate, probe, criteria.are_met(probe)))}\n")
            return probe

        capacity = find_capacity(run, criteria.are_met, first_rate=arguments.first_rate, tolerance=arguments.tolerance)
    sys.stdout.write(render(capacity, criteria))
    if arguments.json is not None:
        write_figures(arguments.json, session.circumstances() | to_json(capacity, criteria))
    return 0 if capacity.best is not None else 1


def render(capacity: Capacity[LiveProbe], criteria: Criteria) -> str:
    """Return what was found, in a line or two."""
    limits = f"P99 TBT <= {criteria.p99_tbt_s:g} s, median scheduling delay <= {criteria.median_scheduling_delay_s:g} s"
    if capacity.best is None:
        return f"no rate down to {min(trial.rate for trial in capacity.trials):.3g} requests/s keeps {limits}\n"
    source = ""
    if capacity.best.result.delay_source == "ttft":
        source = "the server shows no queue times: times to the first token, which are more, stand for them\n"
    return f"capacity {capacity.rate:.3g} requests/s ({limits})\n{source}"


def to_json(capacity: Capacity[LiveProbe], criteria: Criteria) -> dict[str, Figure]:
    """Return what was found and every run; times are in seconds, and those that never ended are null."""
    return {
        "capacity": capacity.rate,
        "p99_tbt_limit_s": criteria.p99_tbt_s,
        "median_scheduling_delay_limit_s": criteria.median_scheduling_delay_s,
        "trials": [
            {
                "rate": trial.rate,
                "is_kept_up": trial.is_kept_up,
                "p99_tbt_s": trial.result.p99_tbt_s,
                "median_scheduling_delay_s": _finite(trial.result.scheduling_delay_s),
                "delay_source": trial.result.delay_source,
                "failed": trial.result.num_failed,
                "is_complete": trial.result.is_complete,
                "duration": trial.result.duration_s,
            }
            for trial in capacity.trials
        ],
    }


@contextmanager
def _opened(runner: asyncio.Runner, arguments: argparse.Namespace) -> Iterator[Session]:
    stack = AsyncExitStack()
    session = runner.run(stack.enter_async_context(open_session(arguments)))
    try:
        yield session
    finally:
        runner.run(stack.aclose())


def _line(trial: Trial[LiveProbe]) -> str:
    probe = trial.result
    ending = "" if probe.is_complete else ", given up early"
    failed = f", {probe.num_failed} failed" if probe.num_failed else ""
    return (
        f"{trial.rate:.3g} requests/s: {'keeps up' if trial.is_kept_up else 'too much'},"
        f" P99 TBT {1e3 * probe.p99_tbt_s:.0f} ms, median scheduling delay {1e3 * probe.scheduling_delay_s:.0f} ms"
        f"{failed}{ending}"
    )


def _finite(value: float) -> float | None:
    return value if value < math.inf else None
