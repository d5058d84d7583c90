"""`sarathi figures`: draw the figures of Sarathi-Serve (OSDI'24) for a machine that need not be there.

What the command runs is loaded when it does, matplotlib above all, which comes with the extra `figures`.
"""

import argparse
from pathlib import Path

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.options import add_machine_arguments, parse_machine

FIGURES = (
    "throughput",
    "operators",
    "linear_layers",
    "chunking",
    "stalls",
    "bubbles",
    "capacity",
    "capacity_by_target",
)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_machine_arguments(parser)
    figures = parser.add_argument_group("the figures")
    figures.add_argument("--out", type=Path, required=True, metavar="DIR", help="write a PNG and a JSON file of each")
    figures.add_argument(
        "--only",
        nargs="+",
        choices=FIGURES,
        metavar="NAME",
        help=f"of {', '.join(FIGURES)}; bubbles are those of two stages at least",
    )
    requests = parser.add_argument_group("the simulated requests")
    requests.add_argument(
        "--trace", type=Path, help="CSV file of their lengths; lognormal like ShareGPT's chats if left out"
    )
    requests.add_argument(
        "--max-model-len", type=int, default=8192, metavar="TOKENS", help="leave longer ones out (default: %(default)s)"
    )
    requests.add_argument(
        "--token-budget", type=int, default=512, metavar="TOKENS", help="of the timelines (default: %(default)s)"
    )
    requests.add_argument(
        "--budgets",
        type=int,
        nargs=2,
        default=(512, 2048),
        metavar=("STRICT", "RELAXED"),
        help="of the capacities, under 5 and 25 times a decode step (default: 512 2048, the paper's on A100s)",
    )
    requests.add_argument(
        "--auto", action="store_true", help="also the capacity by target of token_budget: auto, which takes minutes"
    )
    requests.add_argument(
        "--rate",
        type=float,
        metavar="R",
        help="requests a second of the stalls; half of what full steps serve if left out",
    )
    requests.add_argument(
        "--num-requests",
        type=int,
        default=256,
        metavar="N",
        help="of each run for a capacity, at least; the paper's are of 2048, and short runs hide a queue that grows"
        " (default: %(default)s)",
    )
    requests.add_argument("--seed", type=int, default=0, help="of what is drawn by chance (default: %(default)s)")


def run(arguments: argparse.Namespace) -> int:
    """Draw, tell the files, and return the exit status.

    Raises:
        ConfigError: An option is out of range or does not fit the others, or matplotlib is not installed.
    """
    machine = import_object("rayserve_sarathi.simulation.figures.machine:Machine")(**parse_machine(arguments))
    settings = import_object("rayserve_sarathi.simulation.figures.session:FigureSettings")(
        machine=machine,
        out=arguments.out,
        names=tuple(arguments.only or FIGURES),
        trace=arguments.trace,
        max_model_len=arguments.max_model_len,
        token_budget=arguments.token_budget,
        budgets=tuple(arguments.budgets),
        has_auto=arguments.auto,
        rate=arguments.rate,
        num_requests=arguments.num_requests,
        seed=arguments.seed,
    )
    status: int = import_object("rayserve_sarathi.simulation.figures.session:make_figures")(settings)
    return status
