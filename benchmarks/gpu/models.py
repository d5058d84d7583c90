"""Whole steps of models of published shapes with random weights, and how many requests a second they serve."""

import json
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch
from inline_server import Served, Server
from limits import Limits
from report import Figure
from timing import wall_s

from rayserve_sarathi.config import EngineConfig, SchedulerConfig, SloConfig
from rayserve_sarathi.execution.cuda_graphs import StepLimits
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from rayserve_sarathi.simulation.capacity import find_capacity
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.hardware import Hardware, find_hardware
from rayserve_sarathi.simulation.model_shape import rank_shape
from rayserve_sarathi.simulation.roofline import RooflineTimes
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS, Workload, make_workload
from rayserve_sarathi.step import StepInput
from rayserve_sarathi.step_shape import shape_of

BLOCK_SIZE = 16
MODELS: dict[str, dict[str, object]] = {
    "mistral-7b": {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 32000,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rope_theta": 10000.0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    },
    "yi-34b": {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "vocab_size": 64000,
        "max_position_embeddings": 16384,
        "rope_theta": 5000000.0,
        "rms_norm_eps": 1e-5,
        "torch_dtype": "bfloat16",
    },
}
SMALL = {**MODELS["mistral-7b"], "hidden_size": 1024, "intermediate_size": 2816, "num_hidden_layers": 4} | {
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
}
NUM_DECODES, DECODE_CONTEXT = 32, 4096
STEPS = {
    "1 decode @ 1024": (1, 1024, 0),
    "8 decodes @ 1024": (8, 1024, 0),
    "32 decodes @ 1024": (32, 1024, 0),
    "128 decodes @ 1024": (128, 1024, 0),
    "32 decodes @ 4096": (NUM_DECODES, DECODE_CONTEXT, 0),
    "32 decodes @ 1024, 224 @ 1024": (32, 1024, 224),
    "32 decodes @ 1024, 480 @ 1024": (32, 1024, 480),
    "32 decodes @ 1024, 992 @ 1024": (32, 1024, 992),
    "32 decodes @ 1024, 2016 @ 1024": (32, 1024, 2016),
}


@contextmanager
def model_config(description: dict[str, object]) -> Iterator[EngineConfig]:
    """Yield the configuration of a model with random weights on the GPU."""
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(description))
        yield EngineConfig(
            model=folder, load_format="dummy", device="cuda", block_size=BLOCK_SIZE, enable_prefix_caching=False
        )


def measure_steps(
    name: str, limits: Limits, hardware: str, *, step_names: Collection[str] = STEPS
) -> dict[str, Figure]:
    """Return milliseconds of whole steps, sampling included, with and without CUDA graphs, and the limit."""
    with model_config(MODELS[name]) as config, torch.inference_mode():
        info = resolve_model(config)
        decoder = load_decoder(config, info, stage=0)
        steps = {
            step_name: make_step(
                num_decodes=num_decodes,
                decode_context=context,
                chunks=((chunk, 1024),) if chunk else (),
                block_size=BLOCK_SIZE,
                vocab_size=info.vocab_size,
            )
            for step_name, (num_decodes, context, chunk) in STEPS.items()
            if step_name in step_names
        }
        greedy = {}
        for step_name, step in steps.items():
            sampling = step.sampling.copy()
            sampling["temperature"] = 0
            greedy[step_name] = replace(step, sampling=sampling)
        num_blocks = max(int(step.num_blocks.sum()) for step in steps.values())
        step_limits = StepLimits(num_tokens=2048, num_seqs=128, model_len=8192)
        figures: dict[str, dict[str, Figure]] = {step_name: {} for step_name in steps}
        for way, graph_limits in (("graphs", step_limits), ("eager", None)):
            runner = ModelRunner(decoder, num_blocks=num_blocks, block_size=BLOCK_SIZE, graph_limits=graph_limits)
            for step_name in steps:
                for kind, step in (("", greedy[step_name]), ("_sampling", steps[step_name])):
                    if kind and (way == "eager" or step_name != "32 decodes @ 1024"):
                        continue
                    figures[step_name][f"{way}{kind}_ms"] = 1e3 * wall_s(lambda r=runner, s=step: run_step(r, s))
            del runner
            torch.cuda.empty_cache()
        ideal = _ideal(find_hardware(hardware), limits)
        model = CostModel(
            rank_shape(info.decoder), RooflineTimes(rank_shape(info.decoder), ideal, is_multi_node=False), itemsize=2
        )
        for step_name, step in steps.items():
            limit_ms = 1e3 * model.stage_times_s(shape_of(step))[0]
            figures[step_name]["limit_ms"] = limit_ms
            graphs_ms = figures[step_name]["graphs_ms"]
            assert isinstance(graphs_ms, float)
            figures[step_name]["share_of_limit"] = limit_ms / graphs_ms
    return dict(figures)


def run_step(runner: ModelRunner, step: StepInput) -> None:
    """Compute a step and sample."""
    made = runner.compute(step, None)
    assert not isinstance(made, torch.Tensor), "it is a whole model"
    runner.sample(step, made).wait()


def _ideal(hardware: Hardware, limits: Limits) -> Hardware:
    """Return a GPU that always reaches its limits."""
    return replace(
        hardware,
        peak_flops=limits.operations,
        memory_bandwidth=limits.bandwidth,
        tile_tokens=1,
        launch_s=0.0,
        host_step_s=0.0,
        host_request_s=0.0,
        compute_efficiency=1.0,
        memory_efficiency=1.0,
        attention_compute_efficiency=1.0,
        attention_memory_efficiency=1.0,
    )


def measure_capacity(name: str, target_s: float, *, num_requests: int, first_rate: float) -> dict[str, Figure]:
    """Return the requests a second that each policy serves with P99 TBT within a target, lengths as in the chat trace.

    Args:
        name: Of the model.
        target_s: P99 of the times between tokens.
        num_requests: Of each run.
        first_rate: Where each search begins.
    """
    schedulers = {
        "sarathi_auto": SchedulerConfig(policy="sarathi", token_budget="auto", max_num_batched_tokens=2048),
        "vllm": SchedulerConfig(policy="vllm", max_num_batched_tokens=8192),
    }
    workload = make_workload(SHAREGPT_LENGTHS, num_requests=num_requests, max_total_tokens=8000)
    criteria = Criteria(p99_tbt_s=target_s)
    figures: dict[str, Figure] = {}
    with model_config(MODELS[name]) as config:
        settings = replace(
            config,
            max_model_len=8192,
            slo=SloConfig(tbt_s=target_s),
            scheduler=SchedulerConfig(max_num_seqs=128, token_budget=2048),
        )
        server = Server(settings)
        for policy, scheduler in schedulers.items():
            limited = replace(scheduler, max_num_seqs=128)
            figures[policy] = _search(server, limited, policy, workload, criteria, first_rate)
        server.close()
    return figures


def measure_ahead(name: str) -> dict[str, Figure]:
    """Return the milliseconds between tokens of 32 decodes in the engine, with steps scheduled ahead and without."""
    num_output_tokens = 200
    workload = Workload(
        arrivals_s=np.zeros(NUM_DECODES),
        num_prompt_tokens=np.full(NUM_DECODES, 64),
        num_output_tokens=np.full(NUM_DECODES, num_output_tokens),
        rate=1.0,
    )
    scheduler = SchedulerConfig(max_num_seqs=NUM_DECODES, token_budget=2048)
    figures: dict[str, Figure] = {}
    with model_config(MODELS[name]) as config:
        for way, is_async in (("one_by_one_ms", False), ("ahead_ms", True)):
            settings = replace(config, max_model_len=8192, scheduler=scheduler, async_scheduling=is_async)
            server = Server(settings)
            figures[way] = 1e3 * server.serve(workload, scheduler).gaps.quantile(0.5)
            server.close()
            torch.cuda.empty_cache()
    return figures


def _search(
    server: Server, scheduler: SchedulerConfig, name: str, workload: Workload, criteria: Criteria, first_rate: float
) -> dict[str, Figure]:
    def run(rate: float) -> Served:
        served = server.serve(workload.at_rate(rate), scheduler, give_up_s=criteria.p99_tbt_s)
        sys.stdout.write(
            f"{name}, {rate:.2f}/s: TBT P50 {1e3 * served.gaps.quantile(0.5):.1f} ms, P99 {1e3 * served.p99_tbt_s:.1f}"
            f" ms, longest {1e3 * served.gaps.max:.1f} ms; delay {served.median_scheduling_delay_s:.2f} s\n"
        )
        sys.stdout.flush()
        return served

    found = find_capacity(run, criteria.are_met, first_rate=first_rate, tolerance=0.15)
    figures: dict[str, Figure] = {"requests_per_s": found.rate}
    if found.best is not None:
        best = found.best.result
        figures |= {
            "tbt_p50_ms": 1e3 * best.gaps.quantile(0.5),
            "tbt_p99_ms": 1e3 * best.p99_tbt_s,
            "tbt_max_ms": 1e3 * best.gaps.max,
            "ttft_p50_ms": 1e3 * best.ttft.quantile(0.5),
        }
    return figures
