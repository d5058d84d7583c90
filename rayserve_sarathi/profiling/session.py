"""What `sarathi profile` does: measure, write the file, read it again, and tell how well it predicts other steps."""

import sys
import time
from collections.abc import Sequence
from pathlib import Path

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE, EngineConfig, parse
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.profiling.grid import Grid
from rayserve_sarathi.profiling.profile import Check, check_profile, measure_profile
from rayserve_sarathi.profiling.stage_clock import StageClock
from rayserve_sarathi.simulation.hardware import find_hardware
from rayserve_sarathi.simulation.profile_files import write_profile
from rayserve_sarathi.simulation.step_times import make_step_time_model, profile_name


def run_profile(
    *,
    model: str,
    hardware: str,
    device: str,
    dtype: str,
    grid: Grid,
    num_kv_tokens: int,
    folder: Path,
) -> None:
    """Measure a model on the present device and write its profile into `folder`.

    Args:
        model: Local folder or hub id; its weights are not read, as they make no difference.
        hardware: What the device is called from now on; one of `hardware.HARDWARE`.
        device: As in `EngineConfig`; `dtype` likewise.
        dtype: See above.
        grid: What to measure.
        num_kv_tokens: Of the KV cache.
        folder: Made if it is not there.

    Raises:
        ConfigError: There is no such model or device, or the file cannot be written.
    """
    begin_s = time.perf_counter()
    find_hardware(hardware)
    num_blocks = num_kv_tokens // DEFAULT_BLOCK_SIZE
    if num_blocks < 1:
        raise ConfigError(f"a KV cache of {num_kv_tokens} tokens has no block; give at least {DEFAULT_BLOCK_SIZE}")
    config = parse(
        EngineConfig,
        {"model": model, "device": device, "dtype": dtype, "load_format": "dummy"},
    )
    clock = StageClock(config, num_blocks=num_blocks)
    sys.stderr.write(f"{model} on {clock.device} in {clock.dtype}, {num_blocks} KV blocks\n")
    profile = measure_profile(clock, grid, note=_tell)
    path = folder / profile_name(hardware, model, tensor_parallel_size=1)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_profile(path, profile)
    except OSError as error:
        raise ConfigError(f"cannot write the profile {path}: {error.strerror or error}") from error
    num_points = sum(len(measured.points) for measured in profile.values())
    sys.stdout.write(f"{path}: {num_points} points in {time.perf_counter() - begin_s:.0f} s\n")
    predicted_by = make_step_time_model(model, hardware, source="profile", profiles=folder)
    checks = check_profile(clock, predicted_by, profile, grid, note=_tell)
    sys.stdout.write(render_checks(checks))


def render_checks(checks: Sequence[Check]) -> str:
    """Return the checks as a table; nothing without any."""
    if not checks:
        return ""
    lines = [
        "",
        "steps that were not in it:",
        f"{'decodes':>8} {'chunk':>7} {'context':>8} {'measured':>9} {'predicted':>10}",
    ]
    for check in checks:
        lines.append(
            f"{check.num_decodes:>8} {check.query_len:>7} {check.context_len:>8} {1e3 * check.measured_s:>6.2f} ms"
            f" {1e3 * check.predicted_s:>7.2f} ms {check.predicted_s / check.measured_s - 1:>+7.1%}"
        )
    return "\n".join(lines) + "\n"


def _tell(text: str) -> None:
    sys.stderr.write(f"{text}\n")
