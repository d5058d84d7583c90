"""`sarathi capacity --hardware`: the largest rate that a simulated pipeline keeps up with under a latency target."""

import argparse
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.capacity import find_capacity
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.options import (
    add_system_arguments,
    add_workload_arguments,
    parse_system,
    parse_workload,
)
from rayserve_sarathi.simulation.report import render_table, summarise, write_json
from rayserve_sarathi.simulation.result import SimulationResult

if TYPE_CHECKING:
    from rayserve_sarathi.simulation.system import SimulatedSystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_system_arguments(parser)
    add_workload_arguments(parser)
    group = parser.add_argument_group("when a run keeps up")
    group.add_argument("--tbt", type=float, required=True, metavar="S", help="most for the P99 time between tokens")
    group.add_argument(
        "--delay", type=float, default=2.0, metavar="S", help="most for the median scheduling delay (default: 2)"
    )
    group.add_argument(
        "--tolerance", type=float, default=0.025, metavar="X", help="largest share by which the result is too small"
    )
    group.add_argument("--first-rate", type=float, default=1.0, metavar="X", help="where to begin the search")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file as well")


def run(arguments: argparse.Namespace) -> int:
    """Search and write the figures; return the exit status, 1 if there is no rate that keeps up."""
    system: SimulatedSystem = import_object("rayserve_sarathi.simulation.system:make_system")(parse_system(arguments))
    workload = parse_workload(arguments, rate=None, max_total_tokens=arguments.max_model_len)
    criteria = Criteria(p99_tbt_s=arguments.tbt, median_scheduling_delay_s=arguments.delay)
    run_at = system.at_rates(workload, criteria)

    def run_and_tell(rate: float) -> SimulationResult:
        result = run_at(rate)
        verdict = "keeps up" if criteria.are_met(result) else "does not keep up"
        sys.stdout.write(f"{rate:.4g} requests/s: {verdict}\n")
        sys.stdout.flush()
        return result

    found = find_capacity(
        run_and_tell, criteria.are_met, first_rate=arguments.first_rate, tolerance=arguments.tolerance
    )
    sys.stdout.write(f"\ncapacity: {found.rate:.4g} requests/s\n")
    if found.best is not None:
        sys.stdout.write(render_table(found.best.result))
    if arguments.json is not None:
        figures = {
            "capacity": found.rate,
            "trials": [{"rate": trial.rate, "is_kept_up": trial.is_kept_up} for trial in found.trials],
            "best": None if found.best is None else summarise(found.best.result),
        }
        write_json(arguments.json, figures)
    return 0 if found.best is not None else 1
