"""Bubbles of two pipeline stages under mixed traffic, and what each transport adds to a step.

A model of 100M parameters with random weights, in two processes of one thread each, on up to three cores: one for each
stage, the third for the scheduler. Prompts of 200 to 2,000 tokens come at random (Poisson, a fixed seed), a quarter
more of them than the pipeline can take, so that there is always one to compute; outputs have 32 to 128 tokens.

The overhead of a transport is the time from submit to return that no stage computed, of steps of one token with nothing
else in flight.

python benchmarks/bubbles.py [--json PATH] [--seconds 60] [--transport NAME]
"""

import argparse
import asyncio
import json
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import ray
from ray.util.placement_group import placement_group, remove_placement_group

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import Figure, write_report

from rayserve_sarathi.actors.pipeline import ActorPipeline
from rayserve_sarathi.actors.stage_group import StageGroup
from rayserve_sarathi.actors.transport import TRANSPORTS, Transport
from rayserve_sarathi.config import EngineConfig, SchedulerConfig
from rayserve_sarathi.engine import Engine, RebuildLimit, make_scheduler
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.execution.pipeline import Pipeline
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.placement import stage_bundle
from rayserve_sarathi.registry import load
from rayserve_sarathi.request import Request, RequestOutput, SamplingParams
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.build import max_steps_in_flight

NUM_STAGES = 2
NUM_SMALL_STEPS = 300
PROMPT_TOKENS, OUTPUT_TOKENS = (200, 2000), (32, 128)
LOAD = 1.25
NUM_FIRST = 4
MODEL = {
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 768,
    "intermediate_size": 2560,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_key_value_heads": 4,
    "vocab_size": 8192,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": False,
    "torch_dtype": "float32",
}
_MESSAGE_BYTES = 16 * 1024 * 1024


def make_config(folder: Path, policy: str) -> EngineConfig:
    """Return the engine's settings; the model's description goes into `folder`."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cpu",
        pipeline_parallel_size=NUM_STAGES,
        max_model_len=PROMPT_TOKENS[1] + OUTPUT_TOKENS[1],
        num_gpu_blocks_override=2048,
        enable_prefix_caching=False,
        scheduler=SchedulerConfig(policy=policy, token_budget=128, max_num_waiting=10_000),
    )


@contextmanager
def ray_cluster() -> Iterator[None]:
    """Run a cluster of this process's own."""
    folder = tempfile.mkdtemp(prefix="rs-")
    os.environ["RAY_TMPDIR"] = folder
    os.environ.pop("RAY_ADDRESS", None)
    ray.init(num_cpus=4, include_dashboard=False, log_to_driver=False, configure_logging=False)
    try:
        yield
    finally:
        ray.shutdown()
        shutil.rmtree(folder, ignore_errors=True)


@asynccontextmanager
async def started(config: EngineConfig, transport: str) -> AsyncIterator[tuple[Pipeline, int]]:
    """Start the stages; yield the pipeline and its number of KV blocks."""
    if transport == "inline":
        inline, num_blocks = await asyncio.to_thread(make_inline_pipeline, config, num_threads=1)
        try:
            yield inline, num_blocks
        finally:
            await inline.close()
        return
    num_stages = config.pipeline_parallel_size
    group = placement_group([stage_bundle(config)] * num_stages)
    stages = StageGroup(config, placement_group=group, first_bundle=0)
    try:
        # However many cores there are.
        with patch("rayserve_sarathi.actors.stage_group.num_rank_threads", return_value=1):
            num_blocks = await stages.start()
        way: Transport = load("transport", transport, TRANSPORTS)(
            stages,
            config,
            max_steps_inside=max_steps_in_flight(num_stages) + config.async_scheduling,
            max_message_bytes=_MESSAGE_BYTES,
        )
        pipeline = ActorPipeline(stages, way, step_timeout_s=config.step_timeout_s)
        await pipeline.open()
        try:
            yield pipeline, num_blocks
        finally:
            await pipeline.close()
    finally:
        remove_placement_group(group)


async def measure_overhead(config: EngineConfig, transport: str) -> dict[str, Figure]:
    """Return what a transport adds to a step, in milliseconds."""
    async with started(config, transport) as (pipeline, num_blocks):
        scheduler = make_scheduler(config, resolve_model(config), num_blocks=num_blocks)
        scheduler.add(Request("small", [1] * 8, SamplingParams(max_tokens=NUM_SMALL_STEPS + 20)))
        overhead_ms = []
        while (step := scheduler.schedule(time.monotonic())) is not None:
            submit_s = time.monotonic()
            await pipeline.submit(step)
            output = await pipeline.receive()
            back_s = time.monotonic()
            busy_s = sum(timing.end_s - timing.start_s for timing in output.timings)
            overhead_ms.append((back_s - submit_s - busy_s) * 1e3)
            scheduler.update(output, back_s)
    warm_ms = overhead_ms[-NUM_SMALL_STEPS:]
    return {"p50": statistics.median(warm_ms), "p99": statistics.quantiles(warm_ms, n=100)[98]}


async def measure_bubbles(config: EngineConfig, transport: str, *, seconds: float) -> dict[str, Figure]:
    """Serve mixed traffic; return what each stage did."""
    num_tokens = 0

    def count(outputs: list[RequestOutput]) -> None:
        nonlocal num_tokens
        num_tokens += sum(len(output.token_ids) for output in outputs)

    async with started(config, transport) as (pipeline, num_blocks):
        scheduler = make_scheduler(config, resolve_model(config), num_blocks=num_blocks)
        engine = Engine(scheduler, pipeline, deliver=count, rebuild_limit=RebuildLimit(0, window_s=1.0))
        await engine.warm_up(config.scheduler.max_token_budget)
        begin_s = time.monotonic()
        await engine.warm_up(config.scheduler.max_token_budget)
        prompt_tokens_per_s = config.scheduler.max_token_budget * NUM_STAGES / (time.monotonic() - begin_s)
        requests_per_s = LOAD * prompt_tokens_per_s / statistics.mean(PROMPT_TOKENS)
        running = asyncio.create_task(engine.run())
        begin_s = time.monotonic()
        await send_traffic(engine, requests_per_s=requests_per_s, until_s=begin_s + seconds)
        wall_s = time.monotonic() - begin_s
        snapshot, trace = engine.snapshot(model_name="", pipeline=""), engine.trace(pipeline="")
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    steps = trace.records
    all_s = [stage.busy_s + stage.comm_s + stage.bubble_s for stage in snapshot.stages]
    return {
        "bubble_share": [stage.bubble_s / all_s[index] for index, stage in enumerate(snapshot.stages)],
        "wall_s": wall_s,
        "busy_s": [stage.busy_s for stage in snapshot.stages],
        "comm_s": [stage.comm_s for stage in snapshot.stages],
        "wall_to_busy": NUM_STAGES * wall_s / sum(stage.busy_s for stage in snapshot.stages),
        "steps": len(steps),
        "step_tokens_p50": statistics.median(step.num_decodes + step.num_prefill_tokens for step in steps),
        "prompt_tokens_per_s": sum(step.num_prefill_tokens for step in steps) / wall_s,
        "generation_tokens_per_s": num_tokens / wall_s,
        "requests_sent_per_s": requests_per_s,
    }


async def send_traffic(engine: Engine, *, requests_per_s: float, until_s: float) -> None:
    """Add requests at random times, the first few now: a single one could not keep all stages busy."""
    rng = np.random.default_rng(0)
    index, next_s = 0, time.monotonic()
    while next_s < until_s:
        await asyncio.sleep(max(next_s - time.monotonic(), 0))
        prompt = rng.integers(0, MODEL["vocab_size"], rng.integers(*PROMPT_TOKENS, endpoint=True)).tolist()
        max_tokens = int(rng.integers(*OUTPUT_TOKENS, endpoint=True))
        engine.add(f"request-{index}", prompt, SamplingParams(max_tokens=max_tokens, ignore_eos=True))
        index += 1
        if index >= NUM_FIRST:
            next_s += rng.exponential(1 / requests_per_s)
    await asyncio.sleep(until_s - time.monotonic())


async def measure(folder: Path, *, transport: str, seconds: float) -> dict[str, Figure]:
    """Measure all policies and transports."""
    figures: dict[str, Figure] = {"load_before": os.getloadavg()[0], "transport": transport}
    for policy in SCHEDULERS:
        figures[policy] = await measure_bubbles(make_config(folder, policy), transport, seconds=seconds)
    config = make_config(folder, next(iter(SCHEDULERS)))
    figures["transport_overhead_ms"] = {
        name: await measure_overhead(replace(config, transport=name), name) for name in (*TRANSPORTS, "inline")
    }
    return {**figures, "load_after": os.getloadavg()[0]}


def main() -> None:
    """Parse, measure, report."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    parser.add_argument("--seconds", type=float, default=60.0, help="of traffic for each policy (default: %(default)s)")
    # The order of the table is that of age; the newest is what CPU deployments take.
    newest = list(TRANSPORTS)[-1]
    parser.add_argument("--transport", default=newest, choices=[*TRANSPORTS, "inline"], help="default: %(default)s")
    arguments = parser.parse_args()
    # What is started from here inherits it, so that each stage finds cores for one thread.
    os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: NUM_STAGES + 1])
    with ray_cluster(), tempfile.TemporaryDirectory() as folder:
        figures = asyncio.run(measure(Path(folder), transport=arguments.transport, seconds=arguments.seconds))
    write_report(figures, path=arguments.json)


if __name__ == "__main__":
    main()
