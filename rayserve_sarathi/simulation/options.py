"""Options that the commands of the simulator share: the machine, what is simulated on it, and with which requests."""

import argparse
from pathlib import Path
from typing import TypedDict

from rayserve_sarathi.config import SchedulerConfig, SloConfig, TokenBudget
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.simulation.hardware import HARDWARE
from rayserve_sarathi.simulation.system_config import SystemConfig
from rayserve_sarathi.simulation.workload import (
    ARXIV_LENGTHS,
    SHAREGPT_LENGTHS,
    LognormalLengths,
    Workload,
    make_workload,
    read_trace,
)

_FITTED = {"sharegpt": SHAREGPT_LENGTHS, "arxiv": ARXIV_LENGTHS}
_DEFAULTS = SchedulerConfig()


class MachineOptions(TypedDict):
    """What commands are told of a machine, as those who compute with it take it."""

    model: str
    hardware: str
    tensor_parallel_size: int
    pipeline_parallel_size: int
    profiles: Path | None


def add_machine_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `parse_machine` reads."""
    group = parser.add_argument_group("the machine")
    group.add_argument(
        "--model", required=True, help="such as mistral-7b or yi-34b; or a folder with a config.json, or a hub id"
    )
    group.add_argument("--hardware", required=True, choices=sorted(HARDWARE), help="kind of device")
    group.add_argument("--tensor-parallel-size", type=int, default=1, metavar="N", help="ranks of a stage (default: 1)")
    group.add_argument("--pipeline-parallel-size", type=int, default=1, metavar="N", help="stages (default: 1)")
    group.add_argument(
        "--profiles", type=Path, metavar="DIR", help="measured step times; the hardware's data sheet if left out"
    )


def parse_machine(arguments: argparse.Namespace) -> MachineOptions:
    """Return what was given for `add_machine_arguments`.

    Raises:
        ConfigError: There are no stages, or no ranks.
    """
    for name in ("tensor_parallel_size", "pipeline_parallel_size"):
        if getattr(arguments, name) < 1:
            raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(arguments, name)}")
    return MachineOptions(
        model=arguments.model,
        hardware=arguments.hardware,
        tensor_parallel_size=arguments.tensor_parallel_size,
        pipeline_parallel_size=arguments.pipeline_parallel_size,
        profiles=arguments.profiles,
    )


def add_system_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `parse_system` reads."""
    add_machine_arguments(parser)
    group = parser.add_argument_group("the engine")
    group.add_argument("--policy", default=_DEFAULTS.policy, choices=sorted(SCHEDULERS))
    group.add_argument(
        "--token-budget", type=parse_token_budget, default=_DEFAULTS.token_budget, metavar="N", help="or auto"
    )
    group.add_argument("--slo-tbt-s", type=float, metavar="S", help="target that a token budget of auto keeps")
    group.add_argument("--max-num-seqs", type=int, default=128, metavar="N", help="default: %(default)s")
    group.add_argument("--max-model-len", type=int, default=8192, metavar="N", help="default: %(default)s")
    group.add_argument("--num-blocks", type=int, metavar="N", help="KV blocks of 16 tokens; what fits, if left out")


def parse_system(arguments: argparse.Namespace) -> SystemConfig:
    """Return what is to be simulated.

    Raises:
        ConfigError: A limit of the scheduler is out of range.
    """
    return SystemConfig(
        **parse_machine(arguments),
        max_model_len=arguments.max_model_len,
        num_blocks=arguments.num_blocks,
        scheduler=SchedulerConfig(
            policy=arguments.policy, token_budget=arguments.token_budget, max_num_seqs=arguments.max_num_seqs
        ),
        slo=SloConfig(tbt_s=arguments.slo_tbt_s),
    )


def parse_token_budget(text: str) -> TokenBudget:
    """Return a token budget as it stands on a command line; what is neither a number nor `auto` is refused there."""
    return "auto" if text == "auto" else int(text)


def add_workload_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare what `parse_workload` reads."""
    group = parser.add_argument_group("requests")
    lengths = group.add_mutually_exclusive_group()
    lengths.add_argument(
        "--trace", type=Path, metavar="CSV", help="num_prefill_tokens, num_decode_tokens and perhaps arrived_at"
    )
    lengths.add_argument(
        "--lengths",
        default="sharegpt",
        metavar="LENGTHS",
        help="sharegpt or arxiv, fitted to what the paper says of them, or four numbers of tokens with commas between:"
        " median and 90th percentile of the prompts and of the outputs (default: %(default)s)",
    )
    group.add_argument(
        "--length-divisor", type=int, default=1, metavar="N", help="divide all lengths (default: %(default)s)"
    )
    group.add_argument("--num-requests", type=int, default=2048, metavar="N", help="default: %(default)s")
    group.add_argument("--arrivals", default="poisson", choices=("poisson", "gamma", "recorded"))
    group.add_argument(
        "--arrival-cv", type=float, metavar="X", help="coefficient of variation of gamma arrivals (default: 1)"
    )
    group.add_argument("--seed", type=int, default=0)


def parse_workload(arguments: argparse.Namespace, *, rate: float | None, max_total_tokens: int | None) -> Workload:
    """Return the requests.

    Args:
        arguments: What was given for `add_workload_arguments`.
        rate: Requests a second; see `make_workload`.
        max_total_tokens: Most tokens of a request, prompt and output together; None for no limit.

    Raises:
        ConfigError: There is no such trace, or the arguments make no workload.
    """
    divisor = arguments.length_divisor
    if divisor < 1:
        raise ConfigError(f"--length-divisor must be at least 1, got {divisor}")
    if arguments.arrival_cv is not None and arguments.arrivals != "gamma":
        raise ConfigError(f"--arrival-cv is for --arrivals gamma, and these are {arguments.arrivals}; leave it out")
    workload = make_workload(
        _parse_lengths(arguments.lengths) if arguments.trace is None else read_trace(arguments.trace),
        num_requests=arguments.num_requests,
        rate=rate,
        arrivals=arguments.arrivals,
        arrival_cv=1.0 if arguments.arrival_cv is None else arguments.arrival_cv,
        seed=arguments.seed,
        max_total_tokens=None if max_total_tokens is None else max_total_tokens * divisor,
    )
    return workload.with_lengths_divided(divisor)


def _parse_lengths(text: str) -> LognormalLengths:
    if text in _FITTED:
        return _FITTED[text]
    try:
        prompt_median, prompt_p90, output_median, output_p90 = map(float, text.split(","))
    except ValueError:
        raise ConfigError(
            f"--lengths is one of {sorted(_FITTED)} or four numbers such as 1730,5696,415,834; got {text!r}"
        ) from None
    return LognormalLengths(
        prompt_median=prompt_median, prompt_p90=prompt_p90, output_median=output_median, output_p90=output_p90
    )
