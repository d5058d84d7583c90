"""What `sarathi bench` does, from its options to its report."""

import argparse
import asyncio
import json
import os
import resource
import shlex
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass

import uvloop

from rayserve_sarathi.bench.bench_command import KEY_VARIABLE
from rayserve_sarathi.bench.client import CompletionClient, ServedModel
from rayserve_sarathi.bench.goodput import parse_targets
from rayserve_sarathi.bench.load import Tally
from rayserve_sarathi.bench.planned_load import plan_load
from rayserve_sarathi.bench.prompts import Prompts
from rayserve_sarathi.bench.report import detail, render, write_figures
from rayserve_sarathi.bench.run import find_model, make_prompts, run_load, warm_up
from rayserve_sarathi.bench.summary import Figure, summarise
from rayserve_sarathi.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Session:
    """A server that has answered a first request."""

    client: CompletionClient
    model: ServedModel
    prompts: Prompts

    def circumstances(self) -> dict[str, Figure]:
        """Return what a report says of them."""
        return {
            "command": shlex.join(["sarathi", *sys.argv[1:]]),
            "url": self.client.url,
            "backend": "openai",
            "model_id": self.model.name,
            "max_model_len": self.model.max_model_len,
            "vocab_size": self.prompts.vocab_size,
            "prompt_seed": self.prompts.seed,
        }


def run_bench(arguments: argparse.Namespace) -> int:
    """Run a load and report it; return the exit status.

    Raises:
        ConfigError: An option is wrong, or there is no such server.
    """
    with loop_runner() as runner:
        return runner.run(_bench(arguments))


def loop_runner() -> asyncio.Runner:
    """Return a runner of the faster of the event loops, in a process that may have many connections."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    return asyncio.Runner(loop_factory=uvloop.new_event_loop)


@asynccontextmanager
async def open_session(arguments: argparse.Namespace) -> AsyncIterator[Session]:
    """Connect as the options say, and send the first requests.

    Args:
        arguments: Of `add_server_arguments` and `add_workload_arguments`.

    Raises:
        ConfigError: An option is wrong, or there is no such server or model.
    """
    key = arguments.key or os.environ.get(KEY_VARIABLE)
    extra_body = _parse_body(arguments.extra_body)
    model = await find_model(arguments.url, arguments.model, key=key)
    async with CompletionClient(
        arguments.url,
        model=model.name,
        key=key,
        timeout_s=arguments.timeout,
        ignore_eos=not arguments.end_at_eos,
        has_continuous_usage=not arguments.no_continuous_usage,
        extra_body=extra_body,
        has_keep_alive=not arguments.no_keep_alive,
    ) as client:
        prompts = await make_prompts(client, vocab_size=arguments.vocab_size, seed=arguments.prompt_seed)
        await warm_up(client, prompts, num_requests=arguments.num_warmups)
        yield Session(client=client, model=model, prompts=prompts)


async def _bench(arguments: argparse.Namespace) -> int:
    targets = parse_targets(arguments.goodput)
    percentiles = _parse_percentiles(arguments.metric_percentiles)
    async with open_session(arguments) as session:
        load = plan_load(arguments, max_model_len=session.model.max_model_len)
        tally = Tally(num_requests=len(load))
        try:
            await run_load(session.client, session.prompts, load, tally=tally, stream=sys.stderr)
        except asyncio.CancelledError:  # Ctrl-C: what has ended is worth telling
            if not tally.outcomes:
                raise
    outcomes = sorted(tally.outcomes, key=lambda outcome: outcome.due_s)
    summary = summarise(outcomes, duration_s=tally.duration_s, percentiles=percentiles, targets=targets)
    sys.stdout.write(render(summary, outcomes))
    if num_left := len(load) - len(outcomes):
        sys.stdout.write(f"interrupted: {num_left} of {len(load)} requests were not sent or had not ended\n")
    if arguments.json is not None:
        circumstances = session.circumstances() | {
            "num_prompts": len(load),
            "num_interrupted": num_left,
            "request_rate": arguments.request_rate,
            "arrivals": arguments.arrivals,
            "burstiness": (arguments.arrival_cv or 1.0) ** -2,
            "max_concurrency": arguments.concurrency,
            "seed": arguments.seed,
            "goodput_targets_ms": {} if targets is None else targets.to_json(),
        }
        details = detail(outcomes) if arguments.detailed else {}
        write_figures(arguments.json, circumstances | summary.to_json() | details)
    return 0 if summary.num_completed else 1


def _parse_body(text: str) -> dict[str, object]:
    try:
        body = json.loads(text)
    except ValueError:
        body = None
    if not isinstance(body, dict):
        raise ConfigError(f'--extra-body must be a JSON object such as {{"min_tokens": 8}}, got {text!r}')
    return body


def _parse_percentiles(text: str) -> list[float]:
    try:
        percentiles = [float(part) for part in text.split(",")]
    except ValueError:
        percentiles = [-1.0]
    if not all(0 <= percentile <= 100 for percentile in percentiles):
        raise ConfigError(f"--metric-percentiles must be numbers from 0 to 100 such as 50,99, got {text!r}")
    return percentiles
