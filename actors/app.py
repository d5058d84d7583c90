"""The composition root: the `args` of a deployment file become a Ray Serve application."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from ray import serve
from ray.serve import Application

from rayserve_sarathi.actors.ingress import OpenAIIngress
from rayserve_sarathi.actors.nodes import cluster_nodes
from rayserve_sarathi.actors.scheduler import SchedulerActor
from rayserve_sarathi.config import AppConfig, EngineConfig, parse
from rayserve_sarathi.engine import check_names
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.placement import SCHEDULER_CPUS, Group, Node, explain_shortage, pipeline_group, resolve_auto

# Serve's default of 5 would make the sixth stream wait for the first: admission is the scheduler's, not Serve's.
_MAX_ONGOING_REQUESTS = 100_000
# Serve's default of 20 s is shorter than a long generation.
_GRACEFUL_SHUTDOWN_TIMEOUT_S = 600.0

logger = logging.getLogger(__name__)


def build_app(args: Mapping[str, Any]) -> Application:
    """Return the application that a deployment file's `args` describe.

    Raises:
        ConfigError: A setting is unknown, malformed, out of range or missing, or this cluster could never hold a
            pipeline.
    """
    config = parse(AppConfig, args)
    check_names(config)
    nodes = cluster_nodes()
    config = resolve_auto(config, nodes)
    group = pipeline_group(config)
    _check_placement(config, group, nodes)
    bundles = [dict(bundle.needs) for bundle in group.bundles]
    scheduler = serve.deployment(
        name="SchedulerActor",
        max_ongoing_requests=_MAX_ONGOING_REQUESTS,
        max_queued_requests=-1,  # unbounded here, as the scheduler bounds its own queue and says why
        graceful_shutdown_timeout_s=_GRACEFUL_SHUTDOWN_TIMEOUT_S,
        graceful_shutdown_wait_loop_s=0.5,
        health_check_period_s=2.0,  # Serve learns no sooner that a replica has died
        # The first bundle is the scheduler's own; each stage is pinned to one of the others.
        placement_group_bundles=bundles,
        placement_group_strategy=config.placement_strategy,
        ray_actor_options={"num_cpus": SCHEDULER_CPUS, "num_gpus": bundles[0].get("GPU", 0)},
        request_router_config={
            "request_router_class": "rayserve_sarathi.actors.router:PipelineRouter",
            "request_routing_stats_period_s": 1.0,
        },
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


def _check_placement(config: EngineConfig, group: Group, nodes: Sequence[Node]) -> None:
    """Refuse what Ray would wait for without a word and for ever."""
    shortage = explain_shortage([group], nodes)
    if shortage is None:
        return
    if not config.wait_for_nodes:
        raise ConfigError(
            f"this cluster can never hold {config.model_name}: {shortage};"
            " if it adds nodes when something waits for them, set wait_for_nodes: true"
        )
    logger.warning("%s waits for the cluster to add nodes: %s", config.model_name, shortage)
