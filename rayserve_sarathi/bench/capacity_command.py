"""`sarathi capacity --url`: the largest rate that a running server keeps up with.

What the command runs is loaded when it does, as for `bench_command`.
"""

import argparse
from pathlib import Path

from rayserve_sarathi.bench.bench_command import add_server_arguments, add_workload_arguments
from rayserve_sarathi.registry import import_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_server_arguments(parser)
    # Short runs hide a queue that grows.
    add_workload_arguments(parser, num_requests=2048)
    criteria = parser.add_argument_group("what a rate must keep")
    criteria.add_argument(
        "--tbt", type=float, required=True, metavar="S", help="99%% of the gaps between tokens are at most this long"
    )
    criteria.add_argument(
        "--delay",
        type=float,
        default=2.0,
        metavar="S",
        help="half of the requests get their first step within this time (default: %(default)g)",
    )
    search = parser.add_argument_group("the search")
    search.add_argument(
        "--first-rate", type=float, default=1.0, metavar="R", help="begin at R requests a second (default: %(default)g)"
    )
    search.add_argument(
        "--tolerance", type=float, default=0.025, metavar="SHARE", help="how exact (default: %(default)g)"
    )
    search.add_argument("--json", type=Path, metavar="PATH", help="write the capacity and every run")


def run(arguments: argparse.Namespace) -> int:
    """Search, tell the capacity, and return the exit status."""
    status: int = import_object("rayserve_sarathi.bench.capacity_session:run_capacity")(arguments)
    return status
