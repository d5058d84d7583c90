"""The `sarathi` command. A sub-command's module is loaded when it is the one to run."""

import argparse
import sys
from collections.abc import Sequence
from importlib import import_module

from rayserve_sarathi.errors import SarathiError

COMMANDS = {
    "doctor": ("doctor_command", "say whether a running Ray cluster can serve a deployment file"),
    "bench": ("bench.bench_command", "put a load on a running server and tell how long its tokens took"),
    "capacity": (
        "bench.capacity_command",
        "find the largest rate that a running server keeps up with, or with --hardware a simulated pipeline",
    ),
    "trace": ("trace_command", "fetch the last steps of a running server, to be seen in Perfetto"),
    "why": ("why_command", "say why tokens of a request came later than slo.tbt_s"),
    "predict": ("simulation.predict_command", "say how long steps take on named hardware, without running them"),
    "simulate": ("simulation.simulate_command", "say what a pipeline would do with a workload, without the pipeline"),
    "plan": ("simulation.plan_command", "choose parallelism, token budget and replicas for a rate and a target"),
    "profile": ("profile_command", "measure how long steps take on this device, for predict, simulate and plan"),
    "figures": ("simulation.figures_command", "draw the paper's figures for named hardware"),
}
"""By name: the module inside this package, with `add_arguments` and `run`; what it does."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; return the exit status."""
    argv = sys.argv[1:] if argv is None else argv
    parser = argparse.ArgumentParser(prog="sarathi", description="Tools for deployments of rayserve_sarathi.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for name, (module, what) in COMMANDS.items():
        command_parser = commands.add_parser(name, help=what, description=f"{what[0].upper()}{what[1:]}.")
        if name in argv[:1]:
            is_simulated = name == "capacity" and any(word.partition("=")[0] == "--hardware" for word in argv)
            if is_simulated:
                module = "simulation.simulated_capacity_command"
            command = import_module(f"rayserve_sarathi.{module}")
            command.add_arguments(command_parser)
            command_parser.set_defaults(run=command.run)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except SarathiError as error:
        sys.stderr.write(f"sarathi: {error}\n")
        return 1
