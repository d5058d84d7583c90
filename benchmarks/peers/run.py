"""This engine beside those that people use today, on this machine, with the same checkpoints: tokens a second, gaps.

benchmarks/peers/setup.sh        once: installs the others
python benchmarks/peers/run.py [--engines NAME ...] [--models 15m 125m] [--rounds 3 | --quick] [--json PATH]

Each engine serves OpenAI's API and is driven by the client of `sarathi bench`; OpenVINO GenAI, a library, is driven in
its own process, without HTTP, and so is this engine once more. W1: 16 clients, 64 tokens in and 128 out (output
tokens/s). W2: 8 clients, 1,024 in and 16 out (all tokens/s). W3: eight running decodes while a prompt of 2,000 tokens
comes every two seconds (gaps of the running ones, milliseconds). W4: one client, 32 in and 128 out (output tokens/s).
W5: 64 requests at once, 256 in and 64 out (all tokens/s). All are greedy and in float32, and the first tokens are
compared with transformers'. Engines take turns; of several rounds the median counts. The limit is that of this machine,
measured before and after: operations of a large product, or bytes of the weights.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import urllib.request
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch

sys.path.append(str(Path(__file__).resolve().parents[1]))

from checkpoint import SIZES
from cpu_kernels import measure_limits
from drive import drive, gap_figures
from engines import ENGINES, Endpoint, HttpEngine, NotInstalledError, openvino_command, serving
from in_process import measure_ours
from limits import Limits
from model import NUM_COMPARED, Model
from report import Figure, write_report
from workloads import WORKLOADS, Interference, Workload

from rayserve_sarathi.bench.client import CompletionClient


class TextClient(CompletionClient):
    """Asks in text, and with nothing that is not OpenAI's."""

    def __init__(self, url: str, *, model: str, text: Callable[[Sequence[int]], str]) -> None:
        super().__init__(url, model=model, ignore_eos=False, has_continuous_usage=False)
        self._text = text

    def encode(self, prompt_token_ids: Sequence[int], *, num_tokens: int) -> bytes:
        """See `CompletionClient.encode`."""
        text = self._text(prompt_token_ids)
        return json.dumps(
            {"model": self.model, "stream": True, "temperature": 0, "prompt": text, "max_tokens": num_tokens}
        ).encode()


def measure_http(
    engine: HttpEngine, model: Model, workloads: Sequence[Workload], interference: Interference | None
) -> dict[str, Figure]:
    """Return the figures of an engine's workloads; without W3's if there is no `interference`."""
    is_once = not engine.has_own_way or interference is None
    with serving(engine, model.name, is_interfered=False) as endpoint:
        figures = asyncio.run(_drive_server(endpoint, model, workloads, interference if is_once else None))
        figures["same_tokens"] = compare(endpoint, model)
    if not is_once:
        with serving(engine, model.name, is_interfered=True) as endpoint:
            figures |= asyncio.run(_drive_server(endpoint, model, (), interference))
    return figures


async def _drive_server(
    endpoint: Endpoint, model: Model, workloads: Sequence[Workload], interference: Interference | None
) -> dict[str, Figure]:
    client = (
        TextClient(endpoint.url, model=endpoint.model, text=model.text)
        if endpoint.takes_text
        else CompletionClient(endpoint.url, model=endpoint.model, has_keep_alive=endpoint.has_keep_alive)
    )
    async with client:
        return await drive(client, model, workloads, interference)


def measure_openvino(
    model: Model, workloads: Sequence[Workload], interference: Interference | None
) -> dict[str, Figure]:
    """Return the figures of OpenVINO GenAI's workloads, driven in its own process."""
    figures: dict[str, Figure] = {}
    with (
        tempfile.TemporaryFile("w+") as log,
        subprocess.Popen(
            openvino_command(model.name), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        ) as process,
    ):
        assert process.stdin is not None and process.stdout is not None

        def ask(job: dict[str, object]) -> dict[str, object]:
            assert process.stdin is not None and process.stdout is not None
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            if not line:
                log.seek(0)
                raise NotInstalledError(f"OpenVINO's process has ended: {log.read()[-600:]}")
            answer: dict[str, object] = json.loads(line)
            return answer

        if process.stdout.readline() != "ready\n":
            log.seek(0)
            raise NotInstalledError(f"OpenVINO did not start: {log.read()[-600:]}")

        def generate(prompt: list[int]) -> str:
            token_ids = ask({"kind": "generate", "prompt": prompt, "num_tokens": NUM_COMPARED})["token_ids"]
            assert isinstance(token_ids, list)
            return model.text(token_ids)

        figures["same_tokens"] = model.compare(generate)
        for workload in workloads:
            count = workload.num_requests[model.name]
            answer = ask(
                {
                    "kind": "run",
                    "prompts": [model.prompt(workload.num_prompt_tokens) for _ in range(count)],
                    "num_tokens": workload.num_output_tokens,
                    "num_clients": workload.num_clients,
                }
            )
            seconds = answer["seconds"]
            assert isinstance(seconds, float)
            figures[workload.name] = workload.num_counted(model.name) / seconds
        if interference is not None:
            load = interference
            answer = ask(
                {
                    "kind": "interfere",
                    "prompts": [model.prompt(load.num_prompt_tokens) for _ in range(64)],
                    "long_prompts": [model.prompt(load.long_prompt_tokens) for _ in range(16)],
                    "num_decoding": load.num_decoding,
                    "num_output_tokens": load.num_output_tokens,
                    "long_output_tokens": load.long_output_tokens,
                    "period_s": load.period_s,
                    "duration_s": load.duration_s,
                }
            )
            gaps = answer["gaps_s"]
            assert isinstance(gaps, list)
            figures["W3"] = gap_figures(gaps)
        process.stdin.close()
    return figures


def compare(endpoint: Endpoint, model: Model) -> str:
    """Return how many prompts get an engine's greedy tokens as transformers would have them."""

    def complete(prompt: list[int]) -> str:
        head = model.text(prompt) if endpoint.takes_text else prompt
        body = {"model": endpoint.model, "prompt": head, "max_tokens": NUM_COMPARED, "temperature": 0}
        request = urllib.request.Request(
            f"{endpoint.url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return str(json.load(response)["choices"][0]["text"])

    return model.compare(complete)


def limit_of(workload: Workload, model: Model, limits: Limits) -> float:
    """Return the tokens a second that count if each step took the longer of its operations and its weights' bytes."""
    weights = model.num_parameters()
    prefill_s = 2 * weights * workload.num_prompt_tokens / limits.operations
    rows = workload.num_clients
    decode_s = limits.time_s(4 * weights, 2 * weights * rows) / rows * workload.num_output_tokens
    return workload.num_counted_each / (prefill_s + decode_s)


def median_of(rounds: Sequence[dict[str, Figure]]) -> dict[str, Figure]:
    """Return the median of each figure; of texts all that differ."""
    merged: dict[str, Figure] = {}
    for name, first in rounds[0].items():
        several = [one[name] for one in rounds if name in one]
        if isinstance(first, dict):
            merged[name] = median_of([one for one in several if isinstance(one, dict)])
        elif isinstance(first, float):
            merged[name] = statistics.median(one for one in several if isinstance(one, float))
        else:
            merged[name] = "; ".join(dict.fromkeys(map(str, several)))
    return merged


def _reason(error: Exception) -> str:
    if isinstance(error, ExceptionGroup):
        return "; ".join(dict.fromkeys(map(_reason, error.exceptions)))
    if isinstance(error, subprocess.CalledProcessError) and error.stderr:
        return f"{error}: {error.stderr.decode(errors='replace')[-600:]}"
    return str(error)[-600:] or type(error).__name__


def main() -> None:
    """Let the engines take turns, and write the figures."""
    measure = {
        **{engine.name: partial(measure_http, engine) for engine in ENGINES},
        "openvino": measure_openvino,
        "ours_in_process": measure_ours,
    }
    everyone = list(measure)
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--engines", nargs="+", choices=everyone, default=everyone, help="default: all")
    parser.add_argument("--models", nargs="+", choices=list(SIZES), default=list(SIZES), help="default: all")
    parser.add_argument(
        "--workloads", nargs="+", choices=["W1", "W2", "W3", "W4", "W5"], default=["W1", "W2", "W3", "W4", "W5"]
    )
    parser.add_argument("--rounds", type=int, default=3, help="of which the median counts (default: %(default)s)")
    parser.add_argument("--quick", action="store_true", help="one round of short workloads, to see that engines work")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    workloads = [workload for workload in WORKLOADS if workload.name in arguments.workloads]
    interference = Interference() if "W3" in arguments.workloads else None
    if arguments.quick:
        arguments.rounds = 1
        workloads = [workload.shortened() for workload in workloads]
        interference = interference and interference.shortened()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    limits = measure_limits()
    figures: dict[str, Figure] = {
        "rounds": arguments.rounds,
        "workloads": "short" if arguments.quick else "whole",
    }
    for name in arguments.models:
        model = Model(name)
        rounds: dict[str, list[dict[str, Figure]]] = {engine: [] for engine in arguments.engines}
        failures: dict[str, Figure] = {}
        for number, engine in itertools.product(range(arguments.rounds), arguments.engines):
            if engine in failures:
                continue
            try:
                measured = measure[engine](model, workloads, interference)
            # Whatever goes wrong with one engine is a line about it, and the others go on.
            except (NotInstalledError, RuntimeError, ExceptionGroup, OSError, subprocess.CalledProcessError) as error:
                failures[engine] = _reason(error)
                sys.stdout.write(f"{name}, {engine}: {failures[engine]}\n")
                continue
            rounds[engine].append(measured)
            sys.stdout.write(f"{name}, round {number + 1}, {engine}: {measured}\n")
            sys.stdout.flush()
        limits = limits.or_better(measure_limits())
        figures[name] = {
            "bandwidth_gb_per_s": limits.bandwidth / 1e9,
            "gflop_per_s": limits.operations / 1e9,
            "limit": {workload.name: limit_of(workload, model, limits) for workload in workloads},
            **{engine: median_of(several) for engine, several in rounds.items() if several},
            "failed": failures,
        }
        write_report(figures, path=arguments.json)


if __name__ == "__main__":
    main()
