"""Predict the steps of a prompt's chunks, or of decodes: the figures of `sarathi predict`."""

import json
from collections.abc import Sequence
from pathlib import Path

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.step_times import Source, make_step_time_model
from rayserve_sarathi.step_shape import StepShape

_MAX_LINES = 32


def predict(
    *,
    model: str,
    hardware: str,
    tensor_parallel_size: int,
    pipeline_parallel_size: int,
    profiles: Path | None,
    prefill: int,
    chunk: int | None,
    num_decodes: int,
    context_len: int,
    is_json: bool,
) -> str:
    """Return what the command writes; see `predict_command` for what is asked.

    Raises:
        ConfigError: An option is out of range or does not fit the others.
    """
    _check_at_least("tensor_parallel_size", tensor_parallel_size, 1)
    _check_at_least("pipeline_parallel_size", pipeline_parallel_size, 1)
    shapes = step_shapes(
        prefill=prefill,
        chunk=prefill if chunk is None else chunk,
        num_decodes=num_decodes,
        context_len=context_len,
    )
    source: Source = "roofline" if profiles is None else "profile"
    predicted_by = make_step_time_model(
        model,
        hardware,
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
        source=source,
        profiles=profiles,
    )
    if not is_json:
        return f"{model} on {hardware}, by {source}\n{render(predicted_by, shapes)}"
    asked = {
        "model": model,
        "hardware": hardware,
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "source": source,
    }
    return json.dumps({**asked, **describe(predicted_by, shapes)}, indent=2) + "\n"


def step_shapes(*, prefill: int, chunk: int, num_decodes: int, context_len: int) -> list[StepShape]:
    """Return the steps that a command asks for; see the module.

    Raises:
        ConfigError: A number is out of range, or there is nothing to predict.
    """
    for name, value in (("prefill", prefill), ("decodes", num_decodes), ("context", context_len)):
        _check_at_least(name, value, 0)
    if not prefill and not num_decodes:
        raise ConfigError("there is nothing to predict; give --prefill, --decodes, or both")
    if prefill:
        _check_at_least("chunk", chunk, 1)
    starts = range(0, prefill, chunk) if prefill else range(1)
    shapes = []
    for start in starts:
        query_len = min(chunk, prefill - start)
        is_last = start + query_len == prefill
        # A single token with its context is a decode to every scheduler and kernel.
        is_single = query_len == 1
        shapes.append(
            StepShape(
                num_decodes=num_decodes + is_single,
                decode_context_tokens=num_decodes * context_len + is_single * start,
                chunks=((query_len, start),) if query_len > 1 else (),
                num_samples=num_decodes + (is_last and query_len > 0),
            )
        )
    return shapes


def describe(model: CostModel, shapes: Sequence[StepShape]) -> dict[str, object]:
    """Return the prediction as JSON has it; all times are seconds, and `parts_s` are over all layers and stages."""
    steps = [
        {
            "num_tokens": shape.num_tokens,
            "query_len": shape.chunks[0][0] if shape.chunks else 0,
            "context_len": shape.chunks[0][1] if shape.chunks else 0,
            "num_decodes": shape.num_decodes,
            "total_s": model.latency_s(shape),
            "cpu_s": model.cpu_s(shape),
            "stages_s": model.stage_times_s(shape),
            "transfer_s": model.transfer_s(shape),
            "parts_s": dict(model.parts_s(shape)),
        }
        for shape in shapes
    ]
    return {"total_s": sum(map(model.latency_s, shapes)), "num_steps": len(steps), "steps": steps}


def render(model: CostModel, shapes: Sequence[StepShape]) -> str:
    """Return the prediction as text."""
    lines = [f"{'chunk':>7} {'context':>8} {'decodes':>8} {'cpu ms':>8} {'transfer ms':>12} {'total ms':>9}  stages ms"]
    for shape in shapes[:_MAX_LINES]:
        query_len, context_len = shape.chunks[0] if shape.chunks else (0, 0)
        stages = "  ".join(f"{1e3 * seconds:.2f}" for seconds in model.stage_times_s(shape))
        transfer_s = (model.num_stages - 1) * model.transfer_s(shape)
        lines.append(
            f"{query_len:>7} {context_len:>8} {shape.num_decodes:>8} {1e3 * model.cpu_s(shape):>8.2f}"
            f" {1e3 * transfer_s:>12.2f} {1e3 * model.latency_s(shape):>9.2f}  {stages}"
        )
    if len(shapes) > _MAX_LINES:
        lines.append(f"... and {len(shapes) - _MAX_LINES} steps more; --json has all")
    parts: dict[str, float] = {}
    for shape in shapes:
        for part, seconds in model.parts_s(shape).items():
            parts[part] = parts.get(part, 0.0) + seconds
    total_s = sum(map(model.latency_s, shapes))
    lines += ["", f"total {1e3 * total_s:.2f} ms in {len(shapes)} steps, of which"]
    for part, seconds in sorted(parts.items(), key=lambda item: -item[1]):
        if seconds:
            lines.append(f"  {part:<17} {1e3 * seconds:>9.2f} ms {seconds / total_s:>6.1%}")
    return "\n".join(lines) + "\n"


def _check_at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ConfigError(f"--{name.replace('_', '-')} must be at least {least}, got {value}")
