"""How many pipelines are wanted, from what waits and what is held: an autoscaling policy for Ray Serve.

A deployment file names it: `policy: {policy_function: "rayserve_sarathi.actors.autoscaling:pipelines_wanted"}` under
the `autoscaling_config` of `SchedulerActor`. Serve applies its bounds (`min_replicas`, `max_replicas`) and delays
(`upscale_delay_s`, `downscale_delay_s`, `downscale_to_zero_delay_s`) to the answer.

Calls in progress, which Serve's own policy counts, say nothing here: one stream carries the tokens of all requests of
an ingress, whether there is one or a thousand.

Imports nothing of this package: Serve takes this module by value to its controller, where the package may not be.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from ray.serve.config import AutoscalingContext

MAX_BACKLOG_STEPS = 20.0
"""Prompt tokens that may wait at a pipeline, in steps full of them: with steps of 0.1 s, a first token waits 2 s."""
MAX_KV_CACHE_USAGE = 0.9
MAX_PREFILL_SHARE = 1.0
"""Share of the time in which a pipeline has prompts to compute."""
ROOM = 0.7
"""A pipeline is given up only if the others are then below this share of each limit, so that none misses it at once."""


@dataclass(frozen=True, kw_only=True)
class PipelineLoad:
    """What one pipeline reports; see `SchedulerActor.record_autoscaling_stats`."""

    backlog_steps: float = 0.0
    """Waiting prompt tokens by those of a step, in the mean of Serve's `look_back_period_s`."""
    kv_cache_usage: float = 0.0
    """Share of the KV blocks in use, in the same mean."""
    prefill_share: float = 0.0
    """Share of that period in which prompt tokens waited."""
    num_open_requests: float = 0.0
    """Those that wait or run, at last."""
    max_num_seqs: float = 1.0
    """Those that can run at once."""


def decide(loads: Sequence[PipelineLoad], *, num_running: int, num_pipelines: int, num_queued: float) -> int:
    """Return how many pipelines are wanted.

    Args:
        loads: Of the pipelines that run and have reported.
        num_running: Pipelines that run.
        num_pipelines: Those that run or start.
        num_queued: Calls at ingresses that wait for a pipeline, which happens where none runs.
    """
    if not num_running:
        # Those that start may, as `initial_replicas` wants them or somebody wanted one: if who asked gave up meanwhile,
        # who asks again would wait as long.
        return max(num_pipelines, 1 if num_queued > 0 else 0)
    if num_queued <= 0 and not any(load.num_open_requests > 0 for load in loads):
        return 0
    backlog_steps = sum(load.backlog_steps for load in loads)
    needs = [
        sum(load.kv_cache_usage for load in loads) / MAX_KV_CACHE_USAGE,
        sum(load.num_open_requests / load.max_num_seqs for load in loads),
    ]
    at_least = _round_up(backlog_steps / MAX_BACKLOG_STEPS, *needs)
    prefill_share = sum(load.prefill_share for load in loads)
    enough = _round_up(
        *(need / ROOM for need in (backlog_steps / MAX_BACKLOG_STEPS, prefill_share / MAX_PREFILL_SHARE, *needs))
    )
    return min(max(num_pipelines, at_least), max(enough, at_least))


def pipelines_wanted(context: "AutoscalingContext") -> tuple[int, dict[str, Any]]:
    """Serve asks this several times a second; the second value is state to be handed back, and there is none."""
    means = context.aggregated_metrics or {}
    series = context.raw_metrics or {}

    def load_of(replica: Any) -> PipelineLoad:
        backlog = [point.value for point in series["backlog_steps"][replica]]
        return PipelineLoad(
            backlog_steps=means["backlog_steps"][replica],
            kv_cache_usage=means["kv_cache_usage"][replica],
            prefill_share=sum(value > 0 for value in backlog) / max(len(backlog), 1),
            num_open_requests=series["num_open_requests"][replica][-1].value,
            max_num_seqs=series["max_num_seqs"][replica][-1].value,
        )

    # One that has just started has not reported yet.
    loads = [load_of(replica) for replica in context.running_replicas if series.get("backlog_steps", {}).get(replica)]
    wanted = decide(
        loads,
        num_running=context.current_num_replicas,
        num_pipelines=context.target_num_replicas,
        num_queued=context.total_queued_requests,
    )
    return wanted, {}


def _round_up(*needs: float) -> int:
    return max(1, ceil(max(needs) - 1e-9))
