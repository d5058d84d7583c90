"""Make a profile of the format of `simulation.profile_files` from measured steps, and check it with others.

A stage is not taken apart below its attention: what else its layers take is shared out to the four matrix products by
their FLOPs, and norms, rotary embedding, activation and additions, whose time is in that, have none of their own, nor
has what comes before the layers where one kernel computes a whole step.
Chunks are measured on a stage that has all L layers, the last of which goes on with the last token alone; so a stage
before the last one of a pipeline takes up to 1 / L longer for a chunk than its profile says.
"""

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from statistics import median

import numpy as np

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE, SchedulerConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.profiling.grid import Grid, make_step
from rayserve_sarathi.profiling.stage_clock import StageClock, StepTimes
from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.scheduling.build import build_scheduler
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.interpolation import Curve
from rayserve_sarathi.simulation.model_shape import RankShape, rank_shape
from rayserve_sarathi.simulation.profile_files import (
    LAYER_ELEMENTWISE,
    LAYER_MATRICES,
    OperatorProfile,
    Point,
    make_operator_profile,
)
from rayserve_sarathi.step import StepOutput
from rayserve_sarathi.step_shape import shape_of

_SCHEDULED_STEPS = 30

Profile = Mapping[str, OperatorProfile]


@dataclass(frozen=True, slots=True, kw_only=True)
class Check:
    """A step with decodes and a chunk, which no profile has, measured and predicted.

    Args:
        num_decodes: Of `context_len` tokens each.
        query_len: Of the chunk, after as many tokens.
        context_len: See above.
        measured_s: On the stage, without the scheduler; `predicted_s` likewise.
    """

    num_decodes: int
    query_len: int
    context_len: int
    measured_s: float
    predicted_s: float


def measure_profile(clock: StageClock, grid: Grid, *, note: Callable[[str], None]) -> Profile:
    """Measure all steps of `grid`.

    Args:
        clock: Of the whole model on one rank.
        grid: What to measure; steps that the KV cache has no room for are left out.
        note: Hears of each time that all steps are run.

    Raises:
        ConfigError: The KV cache has no room for any step of decodes, or of a chunk.
    """
    block_size = clock.block_size
    limits = {"max_model_len": clock.max_model_len, "num_blocks": clock.num_blocks, "block_size": block_size}
    vocab_size = clock.decoder_config.vocab_size
    decode_sizes, chunk_sizes = list(grid.decode_steps(**limits)), list(grid.chunk_steps(**limits))
    if not decode_sizes or not chunk_sizes:
        raise ConfigError(
            f"no step of decodes, or none of a chunk, finds room in {clock.num_blocks} KV blocks and"
            f" {clock.max_model_len} tokens of a request; give a larger KV cache or smaller sizes"
        )
    steps = [
        make_step(num_decodes=number, decode_context=context, chunks=(), block_size=block_size, vocab_size=vocab_size)
        for number, context in decode_sizes
    ]
    steps += [
        make_step(num_decodes=0, decode_context=0, chunks=(chunk,), block_size=block_size, vocab_size=vocab_size)
        for chunk in chunk_sizes
    ]
    times = clock.measure(steps, repeats=grid.repeats, note=note)
    decodes = dict(zip(decode_sizes, times[: len(decode_sizes)], strict=True))
    chunks = dict(zip(chunk_sizes, times[len(decode_sizes) :], strict=True))
    schedule_s = {
        num_decodes: measure_scheduler_s(num_decodes) for num_decodes in sorted({size for size, _ in decodes})
    }
    return build_profile(rank_shape(clock.decoder_config), decodes, chunks, schedule_s)


def build_profile(
    shape: RankShape,
    decodes: Mapping[tuple[int, int], StepTimes],
    chunks: Mapping[tuple[int, int], StepTimes],
    schedule_s: Mapping[int, float],
) -> Profile:
    """Return the profile of a rank with all layers.

    Args:
        shape: Of the rank.
        decodes: Steps by number of decodes and context of each.
        chunks: Steps of a chunk by its tokens and its context.
        schedule_s: CPU time of the scheduler by number of decodes.
    """
    num_layers = sum(shape.layers_per_stage)
    by_decodes, by_tokens = _by_size(decodes), _by_size(chunks)
    prepare = {size: median(times.prepare_s for times in several) for size, several in by_decodes.items()}
    # A chunk is a single request; what it prepares beyond that grows with its tokens, as its layers do.
    least_prepare_s = prepare[min(prepare)]
    layers = {size: median(times.layers_s for times in several) for size, several in by_decodes.items()}
    layer_points = [Point(size, 0, seconds / num_layers) for size, seconds in layers.items()]
    for size, several in by_tokens.items():
        seconds = median(times.layers_s + max(0.0, times.prepare_s - least_prepare_s) for times in several)
        layer_points.append(Point(size, 0, seconds / num_layers))
    profile = {}
    for operator in LAYER_MATRICES:
        flops = shape.matrix_flops(operator)
        share = flops / shape.layer_flops
        profile[operator] = make_operator_profile(
            flops, (Point(point.size, 0, share * point.time_s) for point in layer_points)
        )
    for operator in LAYER_ELEMENTWISE:
        profile[operator] = make_operator_profile(shape.elements(operator), [Point(1, 0, 0.0)])
    embeddings = [
        Point(size, 0, times.embed_s)
        for steps in (by_decodes, by_tokens)
        for size, several in steps.items()
        for times in several
    ]
    samples = [Point(size, 0, times.sample_s) for size, several in by_decodes.items() for times in several]
    return profile | {
        "embedding": make_operator_profile(shape.elements("embedding"), embeddings),
        "decode_attention": make_operator_profile(2 * shape.kv_size, _attention(decodes, num_layers)),
        "chunk_attention": make_operator_profile(4 * shape.q_size, _attention(chunks, num_layers)),
        "sample": make_operator_profile(shape.matrix_flops("head"), samples),
        "schedule": make_operator_profile(1, [Point(size, 0, seconds) for size, seconds in schedule_s.items()]),
        "prepare": make_operator_profile(1, [Point(size, 0, seconds) for size, seconds in prepare.items()]),
    }


def measure_scheduler_s(num_decodes: int) -> float:
    """Return the CPU time that the scheduler takes for a step of so many decodes, and for what it samples."""
    num_tokens = _SCHEDULED_STEPS + 2
    scheduler = build_scheduler(
        SchedulerConfig(token_budget=max(512, num_decodes), max_num_seqs=num_decodes),
        num_blocks=num_decodes * (num_tokens + 1),
        block_size=DEFAULT_BLOCK_SIZE,
        enable_prefix_caching=False,
        max_model_len=num_tokens + 1,
        vocab_size=2,
        num_stages=1,
    )
    for index in range(num_decodes):
        scheduler.add(Request(str(index), [0], SamplingParams(max_tokens=num_tokens, ignore_eos=True)))
    seconds = []
    for _ in range(_SCHEDULED_STEPS):
        begin_s = time.perf_counter()
        step = scheduler.schedule(0.0)
        schedule_s = time.perf_counter() - begin_s
        assert step is not None and step.num_tokens == num_decodes, step
        token_ids = np.zeros(num_decodes, dtype=np.int32)
        begin_s = time.perf_counter()
        scheduler.update(StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=token_ids), 0.0)
        seconds.append(schedule_s + time.perf_counter() - begin_s)
    return median(seconds)


def check_profile(
    clock: StageClock,
    model: CostModel,
    profile: Profile,
    grid: Grid,
    *,
    note: Callable[[str], None],
) -> list[Check]:
    """Measure steps of decodes and a chunk together, and predict them.

    Args:
        clock: As measured.
        model: By `profile`.
        profile: As measured.
        grid: From whose sizes the steps are chosen: half of the decodes, half and a quarter of the tokens.
        note: As for `measure_profile`.
    """
    schedule = Curve(profile["schedule"].points)
    num_decodes = max(1, grid.decodes[-1] // 2)
    block_size = clock.block_size
    steps = []
    for query_len in sorted({max(2, grid.chunks[-1] // share) for share in (4, 2)}):
        for context_len in sorted({grid.chunk_contexts[-1] // share for share in (8, 2)}):
            needed = num_decodes * -(-(context_len + 1) // block_size) + -(-(query_len + context_len) // block_size)
            if query_len + context_len <= clock.max_model_len and needed <= clock.num_blocks:
                steps.append(
                    make_step(
                        num_decodes=num_decodes,
                        decode_context=context_len,
                        chunks=((query_len, context_len),),
                        block_size=block_size,
                        vocab_size=clock.decoder_config.vocab_size,
                    )
                )
    checks = []
    for step, measured in zip(steps, clock.measure(steps, repeats=grid.repeats, note=note), strict=True):
        shape = shape_of(step)
        ((query_len, context_len),) = shape.chunks
        checks.append(
            Check(
                num_decodes=num_decodes,
                query_len=query_len,
                context_len=context_len,
                measured_s=measured.total_s,
                predicted_s=model.latency_s(shape) - schedule.at(num_decodes + 1),
            )
        )
    return checks


def _by_size(steps: Mapping[tuple[int, int], StepTimes]) -> dict[int, list[StepTimes]]:
    by_size: dict[int, list[StepTimes]] = {}
    for (size, _), times in steps.items():
        by_size.setdefault(size, []).append(times)
    return by_size


def _attention(steps: Mapping[tuple[int, int], StepTimes], num_layers: int) -> list[Point]:
    return [Point(size, context_len, times.attention_s / num_layers) for (size, context_len), times in steps.items()]
