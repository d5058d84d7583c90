"""From the options of a command to the requests that it sends."""

import argparse

from rayserve_sarathi.bench.run import Load
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.options import parse_workload
from rayserve_sarathi.simulation.workload import Workload


def plan_load(arguments: argparse.Namespace, *, max_model_len: int | None) -> Load:
    """Draw the requests that the options describe; equal options make equal ones.

    Args:
        arguments: Of `bench_command.add_arguments`.
        max_model_len: Most tokens that the server takes, where no option says; None if it does not tell.

    Raises:
        ConfigError: The options contradict each other, or no request fits into the model's context.
    """
    is_recorded = arguments.arrivals == "recorded"
    if arguments.concurrency is not None:
        if arguments.concurrency < 1:
            raise ConfigError(f"--concurrency must be at least 1, got {arguments.concurrency}")
        if is_recorded:
            raise ConfigError("--concurrency sends requests as answers come; leave out --arrivals recorded")
    elif arguments.request_rate is None and not is_recorded:
        raise ConfigError("when are requests sent? give --request-rate, --concurrency, or --arrivals recorded")
    workload = draw_requests(arguments, rate=arguments.request_rate, max_model_len=max_model_len)
    return to_load(workload, num_clients=arguments.concurrency)


def draw_requests(arguments: argparse.Namespace, *, rate: float | None, max_model_len: int | None) -> Workload:
    """Return requests with the lengths and arrivals that the options describe.

    Args:
        arguments: Of `bench_command.add_workload_arguments`.
        rate: Requests a second; None keeps recorded arrivals.
        max_model_len: See `plan_load`.

    Raises:
        ConfigError: See `plan_load`.
    """
    if arguments.max_model_len is not None:
        if arguments.max_model_len < 2:
            raise ConfigError(f"--max-model-len must be at least 2, got {arguments.max_model_len}")
        max_model_len = arguments.max_model_len
    return parse_workload(arguments, rate=rate, max_total_tokens=max_model_len)


def to_load(workload: Workload, *, num_clients: int | None = None) -> Load:
    """Return the requests of a workload, as a closed loop if `num_clients` is given."""
    prompts: list[int] = workload.num_prompt_tokens.tolist()
    outputs: list[int] = workload.num_output_tokens.tolist()
    if num_clients is not None:
        return Load(num_prompt_tokens=prompts, num_output_tokens=outputs, num_clients=num_clients)
    # The first one is sent at once.
    arrivals_s: list[float] = (workload.arrivals_s - workload.arrivals_s[0]).tolist()
    return Load(num_prompt_tokens=prompts, num_output_tokens=outputs, arrivals_s=arrivals_s)
