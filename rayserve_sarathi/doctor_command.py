"""`sarathi doctor`: its options; the work needs Ray, which is loaded when it runs."""

import argparse

from rayserve_sarathi.registry import import_object


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("file", metavar="FILE", help="a Serve config file, such as deployments/tiny.yaml")
    parser.add_argument("--address", help="the cluster's; RAY_ADDRESS, or a cluster on this machine, if left out")
    parser.add_argument("--gpu-memory-gib", type=float, help="memory of a GPU, where Ray's name for it does not say")
    parser.add_argument("--json", action="store_true", help="write the report as JSON")


def run(arguments: argparse.Namespace) -> int:
    """Look at the cluster; return the exit status."""
    return int(
        import_object("rayserve_sarathi.actors.doctor:run")(
            arguments.file,
            address=arguments.address,
            gpu_memory_gib=arguments.gpu_memory_gib,
            is_json=arguments.json,
        )
    )
