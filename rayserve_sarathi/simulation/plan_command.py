"""`sarathi plan`: how to split a model, with which token budget and how many replicas, for a rate and a target.

Each candidate is simulated with the scheduler that serves. What is chosen takes the fewest devices, and of several
plans with as few the shortest P99 time between tokens. Runs are short and budgets few by default, so that an answer
takes less than a minute; `--num-requests` and `--token-budgets` ask for a finer one.
"""

import argparse
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.hardware import HARDWARE
from rayserve_sarathi.simulation.options import add_workload_arguments, parse_token_budget, parse_workload
from rayserve_sarathi.simulation.plan_config import TOKEN_BUDGETS, PlanConfig, Target
from rayserve_sarathi.simulation.report import write_json

_MAX_MODEL_LEN = 8192


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    group = parser.add_argument_group("what to plan for")
    group.add_argument("--model", required=True, help="such as mistral-7b; or a folder with a config.json, or a hub id")
    group.add_argument("--hardware", required=True, choices=sorted(HARDWARE), help="kind of device")
    group.add_argument(
        "--rate", type=float, required=True, metavar="R", help="requests a second, all replicas together"
    )
    group.add_argument("--tbt", type=float, required=True, metavar="S", help="most for the P99 time between tokens")
    group.add_argument(
        "--delay", type=float, default=2.0, metavar="S", help="most for the median scheduling delay (default: 2)"
    )
    group.add_argument(
        "--ttft", type=float, metavar="S", help="most for the P90 time to first token; no limit if left out"
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help=f"most tokens of a request, longer ones are left out (default: {_MAX_MODEL_LEN}, or the model's limit if"
        " that is less)",
    )
    group = parser.add_argument_group("what to choose from")
    group.add_argument("--max-gpus", type=int, default=64, metavar="N", help="of all replicas (default: %(default)s)")
    group.add_argument("--max-stages", type=int, default=4, metavar="N", help="of a pipeline (default: %(default)s)")
    group.add_argument(
        "--token-budgets",
        type=parse_token_budget,
        nargs="+",
        default=list(TOKEN_BUDGETS),
        metavar="N",
        help=f"to try, numbers or auto (default: {' '.join(map(str, TOKEN_BUDGETS))})",
    )
    group.add_argument(
        "--max-num-seqs", type=int, default=128, metavar="N", help="requests that run at once (default: %(default)s)"
    )
    group.add_argument(
        "--gpu-memory-utilization", type=float, default=0.9, metavar="X", help="share to take (default: %(default)s)"
    )
    group.add_argument("--profiles", type=Path, metavar="DIR", help="measured step times instead of data sheets")
    add_workload_arguments(parser)
    parser.set_defaults(num_requests=512)
    parser.add_argument(
        "--json",
        type=Path,
        nargs="?",
        const=Path("-"),
        metavar="PATH",
        help="write the plan as JSON instead of text; with PATH to this file, beside the text",
    )


def run(arguments: argparse.Namespace) -> int:
    """Write the plan; return the exit status, 1 if nothing keeps the target.

    Raises:
        ConfigError: An option is out of range or does not fit the others.
    """
    # Reading model configs takes a second to load.
    find_model = import_object("rayserve_sarathi.simulation.model_shape:find_model")
    make_plan = import_object("rayserve_sarathi.simulation.plan:make_plan")
    render = import_object("rayserve_sarathi.simulation.plan_report:render")
    describe = import_object("rayserve_sarathi.simulation.plan_report:describe")
    if arguments.max_model_len is None:
        arguments.max_model_len = min(_MAX_MODEL_LEN, find_model(arguments.model).max_model_len)
    config = PlanConfig(
        model=arguments.model,
        hardware=arguments.hardware,
        profiles=arguments.profiles,
        rate=arguments.rate,
        max_model_len=arguments.max_model_len,
        max_num_seqs=arguments.max_num_seqs,
        token_budgets=tuple(arguments.token_budgets),
        max_gpus=arguments.max_gpus,
        max_stages=arguments.max_stages,
        gpu_memory_utilization=arguments.gpu_memory_utilization,
    )
    target = Target(
        criteria=Criteria(p99_tbt_s=arguments.tbt, median_scheduling_delay_s=arguments.delay),
        p90_ttft_s=arguments.ttft,
    )
    workload = parse_workload(arguments, rate=None, max_total_tokens=arguments.max_model_len)
    with _quiet_schedulers():
        plan = make_plan(config, workload, target, note=_tell)
    if arguments.json != Path("-"):
        sys.stdout.write(render(plan, config, target, num_requests=arguments.num_requests))
    if arguments.json is not None:
        figures = describe(plan, config, target, num_requests=arguments.num_requests)
        if arguments.json == Path("-"):
            sys.stdout.write(json.dumps(figures, indent=2) + "\n")
        else:
            write_json(arguments.json, figures)
    return 0 if plan.chosen is not None else 1


@contextmanager
def _quiet_schedulers() -> Iterator[None]:
    """Hide that a scheduler cannot keep its target: of a candidate that is ruled out, the reason is in the plan."""
    log = logging.getLogger("rayserve_sarathi.scheduling")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def _tell(text: str) -> None:
    sys.stderr.write(f"{text} ...\n")
