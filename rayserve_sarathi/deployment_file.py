"""What stands in a Serve config file, as far as doctor needs it: Serve's own reader is Ray's."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from rayserve_sarathi.errors import ConfigError

IMPORT_PATH = "rayserve_sarathi.actors.app:build_app"


@dataclass(frozen=True, slots=True, kw_only=True)
class Application:
    """An application of a deployment file.

    Args:
        name: Its name.
        args: Those of `build_app`; None if another function builds it.
        num_pipelines: That it must have.
        max_pipelines: That it may scale up to.
        runtime_env: Of its processes, as Ray takes it.
    """

    name: str
    args: Mapping[str, Any] | None
    num_pipelines: int
    max_pipelines: int
    runtime_env: Mapping[str, Any] = field(default_factory=dict)


def read_deployment(path: Path) -> list[Application]:
    """Read a Serve config file.

    Raises:
        ConfigError: It cannot be read, or is no Serve config file.
    """
    try:
        file = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    applications = file.get("applications") if isinstance(file, dict) else None
    if not isinstance(applications, list) or not all(isinstance(entry, dict) for entry in applications):
        raise ConfigError(f"{path} is no Serve config file: it has no list of applications")
    return [_read_application(entry) for entry in applications]


def _read_application(entry: Mapping[str, Any]) -> Application:
    name = entry.get("name") or "default"
    args, runtime_env = (_read_mapping(entry, key, where=f"application {name}") for key in ("args", "runtime_env"))
    deployments = entry.get("deployments") or []
    if not isinstance(deployments, list) or not all(isinstance(options, dict) for options in deployments):
        raise ConfigError(f"deployments of application {name} must be a list of mappings, got {deployments!r}")
    options: Mapping[str, Any] = next((one for one in deployments if one.get("name") == "SchedulerActor"), {})
    low, high = _read_num_pipelines(options, where=f"SchedulerActor of application {name}")
    return Application(
        name=str(name),
        args=args if entry.get("import_path") == IMPORT_PATH else None,
        num_pipelines=low,
        max_pipelines=high,
        runtime_env=runtime_env,
    )


def _read_num_pipelines(options: Mapping[str, Any], *, where: str) -> tuple[int, int]:
    """Return how many pipelines there must be, and how many there may be, by Serve's rules and defaults."""
    num_replicas = options.get("num_replicas")
    scaling = _read_mapping(options, "autoscaling_config", where=where)
    if num_replicas != "auto" and not scaling:
        fixed = _read_count(options, "num_replicas", default=1, least=1, where=where)
        return fixed, fixed
    if num_replicas not in (None, "auto"):
        raise ConfigError(f"num_replicas of {where} must be auto beside an autoscaling_config, got {num_replicas!r}")
    where = f"autoscaling_config of {where}"
    low = _read_count(scaling, "min_replicas", default=1, least=0, where=where)
    initial = _read_count(scaling, "initial_replicas", default=low, least=low, where=where)
    high = _read_count(
        scaling, "max_replicas", default=100 if num_replicas == "auto" else 1, least=max(initial, 1), where=where
    )
    # Scaled to zero it still needs a place once there is a request.
    return max(1, initial), high


def _read_mapping(settings: Mapping[str, Any], key: str, *, where: str) -> Mapping[str, Any]:
    value = settings.get(key)
    if value is not None and not isinstance(value, dict):
        raise ConfigError(f"{key} of {where} must be a mapping of names to values, got {value!r}")
    return value or {}


def _read_count(settings: Mapping[str, Any], key: str, *, default: int, least: int, where: str) -> int:
    value = default if settings.get(key) is None else settings[key]
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{key} of {where} must be a whole number, at least {least}, got {value!r}")
    return value
