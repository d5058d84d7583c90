"""`sarathi simulate`: what a pipeline would do with a workload, without the pipeline."""

import argparse
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.options import (
    add_system_arguments,
    add_workload_arguments,
    parse_system,
    parse_workload,
)
from rayserve_sarathi.simulation.report import render_table, summarise, write_json, write_parquet

if TYPE_CHECKING:
    from rayserve_sarathi.simulation.system import SimulatedSystem


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    add_system_arguments(parser)
    add_workload_arguments(parser)
    parser.add_argument("--rate", type=float, help="requests a second; 1, or as they were recorded, if left out")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures to this file as well")
    parser.add_argument("--parquet", type=Path, metavar="PATH", help="write a row for each request to this file")


def run(arguments: argparse.Namespace) -> int:
    """Simulate and write the figures; return the exit status."""
    system: SimulatedSystem = import_object("rayserve_sarathi.simulation.system:make_system")(parse_system(arguments))
    workload = parse_workload(arguments, rate=arguments.rate, max_total_tokens=arguments.max_model_len)
    begin_s = time.perf_counter()
    result = system.run(workload)
    took_s = time.perf_counter() - begin_s
    sys.stdout.write(render_table(result))
    sys.stdout.write(f"{system.num_blocks} KV blocks; simulated in {took_s:.1f} s\n")
    if arguments.json is not None:
        figures = {"rate": workload.rate, "num_blocks": system.num_blocks, **summarise(result)}
        write_json(arguments.json, figures)
    if arguments.parquet is not None:
        write_parquet(arguments.parquet, result)
    return 0
