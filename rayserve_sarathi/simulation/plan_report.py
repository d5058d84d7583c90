"""A plan as text, as numbers for JSON, and as the part of a deployment file that carries it out."""

import math
from collections.abc import Mapping

import yaml

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE
from rayserve_sarathi.simulation.hardware import find_hardware
from rayserve_sarathi.simulation.model_shape import find_model
from rayserve_sarathi.simulation.plan import MAX_LOAD, Option, Plan, RuledOut
from rayserve_sarathi.simulation.plan_config import PlanConfig, Target, p90_ttft_s
from rayserve_sarathi.simulation.report import render_table, summarise

_HIGH_LOAD = 0.9
_OPEN_TIMES = 5
"""A run of fewer requests than so many times those open at once tells little of a steady state."""
_HUB_IDS = {
    "mistral-7b": "mistralai/Mistral-7B-v0.1",
    "llama3-8b": "meta-llama/Meta-Llama-3-8B",
    "yi-34b": "01-ai/Yi-34B",
    "codellama-34b": "codellama/CodeLlama-34b-hf",
    "llama2-70b": "meta-llama/Llama-2-70b-hf",
    "falcon-180b": "tiiuae/falcon-180B",
}


def render(plan: Plan, config: PlanConfig, target: Target, *, num_requests: int) -> str:
    """Return a plan for people: all candidates, the chosen one with its figures, and its deployment file.

    Args:
        plan: What was found.
        config: What it is for.
        target: What it keeps.
        num_requests: Of each simulated run.
    """
    limits = (
        f"P99 TBT <= {target.criteria.p99_tbt_s:g} s,"
        f" median scheduling delay <= {target.criteria.median_scheduling_delay_s:g} s"
    )
    if target.p90_ttft_s is not None:
        limits += f", P90 TTFT <= {target.p90_ttft_s:g} s"
    lines = [
        f"{config.model} on {config.hardware}, {config.rate:g} requests/s, {limits}",
        f"by {'data sheet' if config.profiles is None else 'profile'}, {num_requests} requests a run: few requests hide"
        " a queue that grows slowly, so confirm with --num-requests 2048",
        "",
        f"{'TP':>3} {'PP':>3} {'budget':>7} {'replicas':>9} {'GPUs':>5} {'P99 TBT':>9} {'P90 TTFT':>9}",
        *_rows(plan),
        "",
    ]
    if (option := plan.chosen) is None:
        lines.append(f"no plan of up to {config.max_gpus} GPUs keeps that; see the reasons above")
        return "\n".join(lines) + "\n"
    split = option.parallelism
    num_tokens = option.fit.num_blocks * DEFAULT_BLOCK_SIZE
    load = option.rate / plan.capacity
    least = "at least " if plan.capacity >= MAX_LOAD * option.rate else ""
    lines += [
        f"take {option.num_replicas} replica{_s(option.num_replicas)} of TP{split.tensor_parallel_size}-"
        f"PP{split.pipeline_parallel_size}, {option.num_gpus} GPU{_s(option.num_gpus)},"
        f" token budget {option.token_budget}",
        f"each: weights {option.fit.weight_bytes / 1e9:.3g} GB a GPU, KV cache {option.fit.num_blocks:,} blocks"
        f" ({num_tokens:,} tokens)",
        f"each has {option.rate:.3g} requests/s, {load:.0%} of the {least}{plan.capacity:.3g} that it keeps up with,"
        " and then",
    ]
    if load > _HIGH_LOAD:
        lines.append(f"(close to its limit: --rate {1.2 * config.rate:.3g} plans for a fifth more)")
    # By Little's law; a run of as many requests as are open at once ends before any queue has grown.
    num_open = option.rate * float(option.result.latency_s.mean())
    if num_requests < _OPEN_TIMES * num_open:
        lines.append(
            f"(not to be trusted: {num_open:.0f} requests are open at once, for which {num_requests} are too short a"
            f" run; use --num-requests {100 * math.ceil(_OPEN_TIMES * num_open / 50)})"
        )
    lines += [
        "",
        render_table(option.result),
        deployment_yaml(option, config, target),
    ]
    return "\n".join(lines).rstrip() + "\n"


def describe(plan: Plan, config: PlanConfig, target: Target, *, num_requests: int) -> Mapping[str, object]:
    """Return a plan as JSON has it: times in seconds, rates in requests a second; `plan` is null if there is none."""
    return {
        "model": config.model,
        "hardware": config.hardware,
        "source": "roofline" if config.profiles is None else "profile",
        "rate": config.rate,
        "max_model_len": config.max_model_len,
        "num_requests": num_requests,
        "p99_tbt_limit_s": target.criteria.p99_tbt_s,
        "median_scheduling_delay_limit_s": target.criteria.median_scheduling_delay_s,
        "p90_ttft_limit_s": target.p90_ttft_s,
        "plan": None
        if plan.chosen is None
        else _describe_option(plan.chosen)
        | {
            "capacity_per_replica": plan.capacity,
            "predicted": summarise(plan.chosen.result),
            "deployment": deployment_settings(plan.chosen, config, target),
        },
        "candidates": [
            _describe_option(candidate)
            if isinstance(candidate, Option)
            else {
                "tensor_parallel_size": candidate.parallelism.tensor_parallel_size,
                "pipeline_parallel_size": candidate.parallelism.pipeline_parallel_size,
                "token_budget": candidate.token_budget,
                "ruled_out": candidate.reason,
            }
            for candidate in plan.candidates
        ],
    }


def deployment_settings(option: Option, config: PlanConfig, target: Target) -> dict[str, object]:
    """Return the application of a deployment file that has a plan's replicas."""
    decoder, hardware = find_model(config.model), find_hardware(config.hardware)
    args: dict[str, object] = {
        "model": _HUB_IDS.get(config.model.lower(), config.model),
        "device": "cpu" if config.hardware == "cpu" else "cuda",
        "dtype": "bfloat16" if hardware.itemsize == 2 else "float32",
        "max_model_len": config.max_model_len,
        "block_size": DEFAULT_BLOCK_SIZE,
        "gpu_memory_utilization": config.gpu_memory_utilization,
        "tensor_parallel_size": option.parallelism.tensor_parallel_size,
        "pipeline_parallel_size": option.parallelism.pipeline_parallel_size,
        "scheduler": {"token_budget": option.token_budget, "max_num_seqs": config.max_num_seqs},
        "slo": {"tbt_s": target.criteria.p99_tbt_s},
    }
    if config.max_model_len > decoder.max_model_len:
        # More than the model was trained for, which was asked for in so many words.
        args["hf_overrides"] = {"max_position_embeddings": config.max_model_len}
    return {
        "name": config.model.rstrip("/").rpartition("/")[2].lower(),
        "route_prefix": "/",
        "import_path": "rayserve_sarathi.actors.app:build_app",
        "args": args,
        "deployments": [{"name": "SchedulerActor", "num_replicas": option.num_replicas}],
    }


def deployment_yaml(option: Option, config: PlanConfig, target: Target) -> str:
    """Return `deployment_settings` as it stands in a file."""
    return yaml.safe_dump({"applications": [deployment_settings(option, config, target)]}, sort_keys=False)


def _rows(plan: Plan) -> list[str]:
    """Return a line for each option and each reason; budgets of a split that have the same reason share one."""
    rows: list[str] = []
    shown: list[RuledOut] = []
    for candidate in plan.candidates:
        split = candidate.parallelism
        head = f"{split.tensor_parallel_size:>3} {split.pipeline_parallel_size:>3}"
        if isinstance(candidate, Option):
            mark = "  <- chosen" if candidate is plan.chosen else ""
            rows.append(
                f"{head} {candidate.token_budget:>7} {candidate.num_replicas:>9} {candidate.num_gpus:>5}"
                f" {candidate.result.p99_tbt_s:>9.4f} {p90_ttft_s(candidate.result):>9.4f}{mark}"
            )
            continue
        same = [other for other in shown if (other.parallelism, other.reason) == (split, candidate.reason)]
        shown.append(candidate)
        if not same:
            alike = [
                str(other.token_budget)
                for other in plan.candidates
                if isinstance(other, RuledOut)
                and other.token_budget is not None
                and (other.parallelism, other.reason) == (split, candidate.reason)
            ]
            rows.append(f"{head} {', '.join(alike) or '-':>7}  {candidate.reason}")
    return rows


def _describe_option(option: Option) -> dict[str, object]:
    return {
        "tensor_parallel_size": option.parallelism.tensor_parallel_size,
        "pipeline_parallel_size": option.parallelism.pipeline_parallel_size,
        "token_budget": option.token_budget,
        "num_replicas": option.num_replicas,
        "num_gpus": option.num_gpus,
        "rate_per_replica": option.rate,
        "weight_bytes": option.fit.weight_bytes,
        "num_kv_blocks": option.fit.num_blocks,
        "p99_tbt_s": option.result.p99_tbt_s,
        "p90_ttft_s": p90_ttft_s(option.result),
        "median_scheduling_delay_s": option.result.median_scheduling_delay_s,
    }


def _s(count: int) -> str:
    return "s" * (count != 1)
