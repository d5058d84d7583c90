"""The `sarathi` command. What a sub-command needs is loaded when it runs, Ray above all."""

import argparse
import sys
from collections.abc import Sequence
from typing import Any

from rayserve_sarathi import trace_command
from rayserve_sarathi.errors import SarathiError
from rayserve_sarathi.registry import import_object


def main(argv: Sequence[str] | None = None) -> int:
    """Run a sub-command; return the exit status."""
    parser = argparse.ArgumentParser(prog="sarathi", description="Tools for deployments of rayserve_sarathi.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    _add_doctor(commands)
    _add_trace(commands)
    arguments = parser.parse_args(argv)
    try:
        return int(arguments.run(arguments))
    except SarathiError as error:
        sys.stderr.write(f"sarathi: {error}\n")
        return 1


def _add_doctor(commands: Any) -> None:
    parser = commands.add_parser("doctor", help="say whether a running Ray cluster can serve a deployment file")
    parser.add_argument("file", metavar="FILE", help="a Serve config file, such as deployments/tiny.yaml")
    parser.add_argument("--address", help="the cluster's; RAY_ADDRESS, or a cluster on this machine, if left out")
    parser.add_argument("--gpu-memory-gib", type=float, help="memory of a GPU, where Ray's name for it does not say")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")
    parser.set_defaults(
        run=lambda arguments: import_object("rayserve_sarathi.actors.doctor:run")(
            arguments.file,
            address=arguments.address,
            gpu_memory_gib=arguments.gpu_memory_gib,
            is_json=arguments.json,
        )
    )


def _add_trace(commands: Any) -> None:
    parser = commands.add_parser("trace", help="fetch the last steps of a running server, to be seen in Perfetto")
    trace_command.add_arguments(parser)
    parser.set_defaults(run=trace_command.run)
