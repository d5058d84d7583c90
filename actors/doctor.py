"""`sarathi doctor`: look at a running cluster before a deployment file is started there."""

import json
import logging
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import ray
from ray.exceptions import AuthenticationError, GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from rayserve_sarathi.actors.link_end import LinkEnd
from rayserve_sarathi.actors.nodes import cluster_nodes
from rayserve_sarathi.deployment_file import read_deployment
from rayserve_sarathi.doctor import LinkResult, examine, render
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.placement import Node

_LINK_TIMEOUT_S = 5.0
_START_TIMEOUT_S = 60.0


def run(path: str, *, address: str | None, gpu_memory_gib: float | None, is_json: bool) -> int:
    """Write a report to stdout; return 1 if something in it cannot work.

    Raises:
        ConfigError: The file cannot be read, or there is no cluster that lets this process in.
    """
    applications = read_deployment(Path(path))
    # The actors that probe links must find this package, as the application's do; of several applications, the first's.
    environments = [application.runtime_env for application in applications if application.args is not None]
    try:
        ray.init(
            address or "auto",
            runtime_env=next((dict(environment) for environment in environments if environment), None),
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except AuthenticationError as error:
        raise ConfigError(
            f"the cluster does not let this process in ({error.message}); set RAY_AUTH_MODE=token, and copy"
            " ~/.ray/auth_token from the cluster's head or set RAY_AUTH_TOKEN"
        ) from None
    except (TypeError, ValueError) as error:
        raise ConfigError(f"ray does not take the address or the application's runtime_env: {error}") from None
    except (ConnectionError, RuntimeError) as error:
        raise ConfigError(
            f"there is no Ray cluster to look at ({error}); start one with ray start --head, or give --address"
        ) from None
    try:
        nodes = cluster_nodes()
        report = examine(path, applications, nodes, _probe_links(nodes), gpu_memory_gib=gpu_memory_gib)
    finally:
        ray.shutdown()
    sys.stdout.write(json.dumps(report.to_json(), indent=2) + "\n" if is_json else render(report))
    return 0 if report.can_work else 1


def _probe_links(nodes: Sequence[Node]) -> list[LinkResult]:
    """Probe every link, in both directions."""
    if len(nodes) < 2:
        return []
    actor_class: Any = ray.remote(num_cpus=0)(LinkEnd)
    ends: dict[str, Any] = {
        node.name: actor_class.options(
            scheduling_strategy=NodeAffinitySchedulingStrategy(node.node_id, soft=False)
        ).remote(timeout_s=_LINK_TIMEOUT_S)
        for node in nodes
    }
    addresses = _gather({name: end.address.remote() for name, end in ends.items()}, timeout_s=_START_TIMEOUT_S)
    results = [
        LinkResult(source=name, target=None, outcome=f"no process could be started there: {address}")
        for name, address in addresses.items()
        if isinstance(address, str)
    ]
    reached = [name for name, address in addresses.items() if not isinstance(address, str)]
    # Each begins with its right neighbour, so that at any moment about every node is the target of one.
    targets = {name: reached[index + 1 :] + reached[:index] for index, name in enumerate(reached)}
    calls = {name: ends[name].probe.remote([addresses[target] for target in targets[name]]) for name in reached}
    answers = _gather(calls, timeout_s=_LINK_TIMEOUT_S * len(nodes) + _START_TIMEOUT_S)
    for name in reached:
        answer = answers[name]
        outcomes = [answer] * len(targets[name]) if isinstance(answer, str) else answer
        results += [
            LinkResult(source=name, target=target, outcome=outcome)
            for target, outcome in zip(targets[name], outcomes, strict=True)
        ]
    return results


def _gather(calls: Mapping[str, Any], *, timeout_s: float) -> dict[str, Any]:
    """Return each call's answer, or as a text what is wrong with it."""
    ray.wait(list(calls.values()), num_returns=len(calls), timeout=timeout_s)
    answers: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            answers[name] = ray.get(call, timeout=0.1)
        except GetTimeoutError:
            answers[name] = f"no answer within {timeout_s:g} s"
        except RayError as error:
            answers[name] = (str(error).strip().splitlines() or [type(error).__name__])[-1]
    return answers
