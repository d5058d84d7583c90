"""What the engine costs beside its stages: wall time of a step over what its stage computes, and CPU time of a token.

python benchmarks/overhead.py [--quick] [--json PATH]

First, decodes of a model whose steps take about 20 ms on a stage of one thread, with one stage and with two, by each
transport: the time from the end of a step to the end of the next over the time that the slowest stage computed, median
and P99. With two stages there are twice as many decodes, so that both always have a step. Beside it what the same would
be if steps with the same times at each stage had followed each other at once, as stages wait for each other where their
times vary; and what it is of as many bare threads that only compute and tell an event loop, which is late at times.

Then 128 streams through HTTP of a server as `make serve` starts it, of a small model: CPU time of all processes but the
client's and the stage's, which computes, by streamed token.
"""

import argparse
import asyncio
import itertools
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[1])]
from bubbles import MODEL, ray_cluster, started  # noqa: E402  where it is is set above
from report import Figure, write_report  # noqa: E402  where it is is set above

from rayserve_sarathi.actors.transport import TRANSPORTS  # noqa: E402
from rayserve_sarathi.bench.client import CompletionClient  # noqa: E402
from rayserve_sarathi.bench.load import Send, Tally, run_closed_loop  # noqa: E402
from rayserve_sarathi.bench.outcome import Outcome  # noqa: E402
from rayserve_sarathi.config import EngineConfig, SchedulerConfig  # noqa: E402
from rayserve_sarathi.engine import Engine, RebuildLimit, make_scheduler  # noqa: E402
from rayserve_sarathi.models.resolve import resolve_model  # noqa: E402
from rayserve_sarathi.request import RequestOutput, SamplingParams  # noqa: E402
from rayserve_sarathi.step_log import StepRecord  # noqa: E402
from tests.actors.cluster import Server, serve_run  # noqa: E402

NUM_DECODES = 4
PROMPT_TOKENS = 32
NUM_STREAMS, STREAM_TOKENS = 128, 200
_BARE_ROWS = 1024
"""A product of so many rows and columns takes some 20 ms."""
_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def make_config(folder: Path, *, num_stages: int) -> EngineConfig:
    """Return the engine's settings; the model's description goes into `folder`."""
    model = {**MODEL, "num_hidden_layers": 11 * num_stages}
    (folder / "config.json").write_text(json.dumps(model))
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cpu",
        pipeline_parallel_size=num_stages,
        max_model_len=2048,
        num_gpu_blocks_override=1024,
        enable_prefix_caching=False,
        scheduler=SchedulerConfig(token_budget=128),
    )


async def measure_steps(config: EngineConfig, transport: str, *, num_steps: int) -> dict[str, Figure]:
    """Return how long a step of decodes takes and what of it its slowest stage computes, milliseconds and ratios."""
    num_requests = NUM_DECODES * config.pipeline_parallel_size
    num_open = num_requests
    ended = asyncio.Event()

    def deliver(outputs: list[RequestOutput]) -> None:
        nonlocal num_open
        num_open -= sum(output.finish_reason is not None for output in outputs)
        if not num_open:
            ended.set()

    async with started(config, transport) as (pipeline, num_blocks):
        scheduler = make_scheduler(config, resolve_model(config), num_blocks=num_blocks)
        engine = Engine(scheduler, pipeline, deliver=deliver, rebuild_limit=RebuildLimit(0, window_s=1.0))
        await engine.warm_up(PROMPT_TOKENS)
        running = asyncio.create_task(engine.run())
        for index in range(num_requests):
            sampling = SamplingParams(max_tokens=num_steps + 1, ignore_eos=True, temperature=0)
            engine.add(str(index), [1 + index] * PROMPT_TOKENS, sampling)
        await ended.wait()
        records = [step for step in engine.trace(pipeline="").records if not step.num_prefill_tokens]
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    records = records[len(records) // 10 :]
    walls = [after.back_s - before.back_s for before, after in itertools.pairwise(records)]
    computes = [max(end_s - start_s for _, start_s, end_s in step.stages) for step in records[1:]]
    perfect_walls = [after - before for before, after in itertools.pairwise(_pass_at_once(records))]
    return {
        "step_ms": 1e3 * statistics.median(walls),
        "stage_ms": 1e3 * statistics.median(computes),
        "decodes_of_a_step": statistics.median(step.num_decodes for step in records),
        **_quantiles_of_ratios("ratio", walls, computes),
        **_quantiles_of_ratios("perfect", perfect_walls, computes),
    }


def _quantiles_of_ratios(name: str, walls: Sequence[float], computes: Sequence[float]) -> dict[str, Figure]:
    ratios = [wall / compute for wall, compute in zip(walls, computes, strict=True)]
    return {f"{name}_p50": statistics.median(ratios), f"{name}_p99": statistics.quantiles(ratios, n=100)[98]}


def _pass_at_once(records: Sequence[StepRecord]) -> list[float]:
    """Return when each step would come back if nothing but stages took time, all decodes being in so many steps."""
    backs: list[float] = []
    free_s = [0.0] * len(records[0].stages)
    for index, record in enumerate(records):
        now_s = backs[index - len(free_s)] if index >= len(free_s) else 0.0
        for stage, (_, start_s, end_s) in enumerate(record.stages):
            now_s = free_s[stage] = max(now_s, free_s[stage]) + end_s - start_s
        backs.append(now_s)
    return backs


async def measure_bare_threads(num_threads: int, *, num_steps: int) -> dict[str, Figure]:
    """Return the same figures of threads that compute some 20 ms again and again, and tell the event loop."""
    loop = asyncio.get_running_loop()
    computes: list[list[float]] = [[] for _ in range(num_threads)]
    backs: list[list[float]] = [[] for _ in range(num_threads)]

    def compute(index: int) -> None:
        torch.set_num_threads(1)
        matrix = torch.ones(_BARE_ROWS, _BARE_ROWS)
        product = torch.empty_like(matrix)
        for _ in range(num_steps):
            start_s = time.monotonic()
            torch.mm(matrix, matrix, out=product)
            computes[index].append(time.monotonic() - start_s)
            loop.call_soon_threadsafe(lambda: backs[index].append(time.monotonic()))

    with ThreadPoolExecutor(num_threads) as threads:
        await asyncio.gather(*(loop.run_in_executor(threads, compute, index) for index in range(num_threads)))
    walls = [after - before for told in backs for before, after in itertools.pairwise(told)]
    alone = [time_s for times_s in computes for time_s in times_s[1:]]
    return {"stage_ms": 1e3 * statistics.median(alone), **_quantiles_of_ratios("ratio", walls, alone)}


def measure_tokens(*, num_rounds: int) -> dict[str, Figure]:
    """Return microseconds of CPU time by streamed token, of a server's processes and by process."""
    arguments = {
        "model": "sarathi-tiny",
        "device": "cpu",
        "num_gpu_blocks_override": 4096,
        "scheduler": {"max_num_seqs": NUM_STREAMS, "token_budget": 512},
    }
    with tempfile.TemporaryDirectory(prefix="rs-overhead-") as folder, serve_run(Path(folder), arguments) as server:
        asyncio.run(_stream(server.url, num_rounds=1))  # HAProxy knows of a new ingress after some seconds
        time.sleep(2)
        before = _cpu_s(server)
        num_tokens = asyncio.run(_stream(server.url, num_rounds=num_rounds))
        after = _cpu_s(server)
    by_process = {name: spent_s - before.get(name, 0.0) for name, spent_s in after.items() if "StageActor" not in name}
    costs = {name: 1e6 * spent_s / num_tokens for name, spent_s in by_process.items()}
    return {
        "us_by_token": sum(costs.values()),
        "by_process": {name: cost for name, cost in sorted(costs.items(), key=lambda item: -item[1]) if cost >= 1},
    }


async def _stream(url: str, *, num_rounds: int) -> int:
    """Keep the streams open until each client has had some answers; return their tokens."""
    async with CompletionClient(url, model="sarathi-tiny") as client:
        body = client.encode(range(1, 9), num_tokens=STREAM_TOKENS)

        async def send(due_s: float) -> Outcome:
            return await client.complete(body, num_prompt_tokens=8, num_tokens=STREAM_TOKENS, due_s=due_s)

        def prepare(index: int) -> Send:
            return send

        tally = Tally(num_requests=NUM_STREAMS * num_rounds)
        await run_closed_loop(prepare, num_clients=NUM_STREAMS, tally=tally)
    assert not tally.num_failed, f"{tally.num_failed} requests failed"
    return sum(outcome.num_output_tokens for outcome in tally.outcomes)


def _cpu_s(server: Server) -> dict[str, float]:
    """Return the CPU time of the processes of a server's cluster, by what they are."""
    spent: dict[str, float] = {}
    for pid in server.pids(""):
        try:
            title = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0].decode(errors="replace")
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except (FileNotFoundError, ProcessLookupError):
            continue  # it has just ended
        name = title.partition(".")[0] if title.startswith("ray::") else Path(title).name
        spent[name] = spent.get(name, 0.0) + (int(fields[11]) + int(fields[12])) / _TICKS_PER_S
    return spent


async def measure_transports(folder: Path, *, num_steps: int) -> dict[str, Figure]:
    """Measure each transport with one stage and with two."""
    figures: dict[str, Figure] = {}
    for num_stages in (1, 2):
        plural = "s" if num_stages > 1 else ""
        figures[f"{num_stages} bare thread{plural}"] = await measure_bare_threads(num_stages, num_steps=num_steps)
        config = make_config(folder, num_stages=num_stages)
        for transport in ("inline", *TRANSPORTS):
            name = f"{num_stages} stage{plural}, {transport}"
            figures[name] = await measure_steps(replace(config, transport=transport), transport, num_steps=num_steps)
    return figures


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="fewer steps and tokens")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    with ray_cluster(), tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure_transports(Path(folder), num_steps=100 if arguments.quick else 400))
    figures["streams"] = measure_tokens(num_rounds=1 if arguments.quick else 5)
    write_report(figures, path=arguments.json)


if __name__ == "__main__":
    main()
