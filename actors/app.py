"""The composition root: the `args` of a deployment file become a Ray Serve application."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import ray
from ray import serve
from ray.serve import Application

from rayserve_sarathi.actors.ingress import OpenAIIngress
from rayserve_sarathi.actors.pipeline import stage_bundle
from rayserve_sarathi.actors.scheduler import SchedulerActor
from rayserve_sarathi.config import AppConfig, EngineConfig, parse
from rayserve_sarathi.engine import check_names

# Serve's default of 5 would make the sixth stream wait for the first: admission is the scheduler's, not Serve's.
_MAX_ONGOING_REQUESTS = 100_000
# Serve's default of 20 s is shorter than a long generation.
_GRACEFUL_SHUTDOWN_TIMEOUT_S = 600.0
_SCHEDULER_CPUS = 0.1


def build_app(args: Mapping[str, Any]) -> Application:
    """Return the application that a deployment file's `args` describe.

    Raises:
        ConfigError: A setting is unknown, malformed or out of range.
    """
    config = parse(AppConfig, args)
    check_names(config)
    config = replace(config, device=_find_device(config))
    num_stages = config.pipeline_parallel_size if config.transport == "compiled_graph" else 0
    scheduler_bundle = {"CPU": _SCHEDULER_CPUS}
    if config.transport == "inline" and config.device == "cuda":
        scheduler_bundle["GPU"] = 1.0
    scheduler = serve.deployment(
        name="SchedulerActor",
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_queued_requests=-1,  # unbounded here, as the scheduler bounds its own queue and says why
        graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=5.0,
        # The first bundle is the scheduler's own; each stage is pinned to one of the others.
        placement_group_bundles=[scheduler_bundle, *[stage_bundle(config.device)] * num_stages],
        ray_actor_options={"num_cpus": _SCHEDULER_CPUS, "num_gpus": scheduler_bundle.get("GPU", 0)},
        request_router_config={"request_router_class": "rayserve_sarathi.actors.router:PipelineRouter"},
    )(SchedulerActor)
    ingress = serve.deployment(
        name="OpenAIIngress",
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_queued_requests=-1,
        graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        ray_actor_options={"num_cpus": 0},
    )(serve.ingress()(OpenAIIngress))
    return ingress.bind(config, scheduler.bind(config.engine))


def _find_device(config: EngineConfig) -> Any:
    """Return what `auto` means in this cluster, so that all its processes agree."""
    if config.device != "auto":
        return config.device
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]  # Ray's annotation is missing
    return "cuda" if resources.get("GPU", 0) > 0 else "cpu"
