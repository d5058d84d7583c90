"""Compute the series that are asked for, write each as JSON, and draw it beside."""

import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.figures.bubbles import BubbleSeries, bubbles
from rayserve_sarathi.simulation.figures.capacities import (
    BUDGETS,
    CapacityBars,
    CapacityCurves,
    capacity_bars,
    capacity_curves,
)
from rayserve_sarathi.simulation.figures.chunking import ChunkingSeries, chunking
from rayserve_sarathi.simulation.figures.experiment import Experiment
from rayserve_sarathi.simulation.figures.linear_layers import LinearLayerSeries, linear_layers
from rayserve_sarathi.simulation.figures.machine import Machine
from rayserve_sarathi.simulation.figures.operators import OperatorSeries, time_by_operator
from rayserve_sarathi.simulation.figures.stalls import StallSeries, stalls
from rayserve_sarathi.simulation.figures.throughput import ThroughputSeries, throughput
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS, Workload, read_trace

_NUM_TIMELINE_REQUESTS = 64
_NUM_PIPELINE_REQUESTS = 8
_PIPELINE_OUTPUT_TOKENS = 16


@dataclass(frozen=True, slots=True, kw_only=True)
class FigureSettings:
    """What is drawn.

    Args:
        machine: The machine.
        out: Folder of the files, made if it is not there.
        names: Of figures, those of `SERIES`.
        trace: Of requests; None draws lengths like those of ShareGPT chats.
        max_model_len: Most tokens of a request.
        token_budget: For the timelines.
        budgets: For the capacities: under the strict and the relaxed target.
        has_auto: Whether to draw the capacity by target with `token_budget: auto` as well.
        rate: Requests a second of the timeline of stalls; None takes half of what full steps would serve.
        num_requests: Of each run of a capacity search at least.
        seed: Of everything drawn by chance.
    """

    machine: Machine
    out: Path
    names: tuple[str, ...]
    trace: Path | None = None
    max_model_len: int = 8192
    token_budget: int = 512
    budgets: tuple[int, int] = BUDGETS
    has_auto: bool = False
    rate: float | None = None
    num_requests: int = 256
    seed: int = 0

    def __post_init__(self) -> None:
        if min(self.budgets) < 1:
            raise ConfigError(f"--budgets must be at least 1, got {self.budgets}")
        for name in ("max_model_len", "token_budget", "num_requests"):
            if getattr(self, name) < 1:
                raise ConfigError(f"--{name.replace('_', '-')} must be at least 1, got {getattr(self, name)}")

    @property
    def traffic(self) -> str:
        """Where lengths come from, for a reader."""
        return "lengths like ShareGPT's chats" if self.trace is None else f"lengths of {self.trace.name}"

    def experiment(self, machine: Machine) -> Experiment:
        """Return what simulates a machine with these requests.

        Raises:
            ConfigError: The machine cannot be, or the trace cannot be read.
        """
        return Experiment(
            model=machine.step_times(),
            num_blocks=machine.num_kv_blocks(DEFAULT_BLOCK_SIZE),
            max_model_len=self.max_model_len,
            lengths=SHAREGPT_LENGTHS if self.trace is None else read_trace(self.trace),
            seed=self.seed,
        )


Series = (
    ThroughputSeries
    | OperatorSeries
    | LinearLayerSeries
    | ChunkingSeries
    | StallSeries
    | BubbleSeries
    | CapacityBars
    | CapacityCurves
)
Compute = Callable[[FigureSettings], tuple[Machine, Series]]


def make_figures(settings: FigureSettings) -> int:
    """Write NAME.json and NAME.png for each figure, tell their paths, and return the exit status.

    Raises:
        ConfigError: matplotlib is not installed, a name is unknown, or the folder or the machine cannot be.
    """
    if unknown := [name for name in settings.names if name not in SERIES]:
        raise ConfigError(f"unknown figure {unknown[0]!r}; use some of {list(SERIES)}")
    save, drawings = _drawing()
    for name in settings.names:
        machine, series = SERIES[name](settings)
        title = f"{machine.title}\n{settings.traffic}" if name in SIMULATED else machine.title
        try:
            settings.out.mkdir(parents=True, exist_ok=True)
            (settings.out / f"{name}.json").write_text(_as_json(machine, settings, series))
            save(drawings[name], series, title, settings.out / f"{name}.png")
        except OSError as error:
            raise ConfigError(f"cannot write to --out {settings.out}: {error.strerror or error}") from error
        sys.stdout.write(f"{settings.out / name}.png\n")
    return 0


def _as_json(machine: Machine, settings: FigureSettings, series: Series) -> str:
    requests = {
        "trace": None if settings.trace is None else str(settings.trace),
        "max_model_len": settings.max_model_len,
        "seed": settings.seed,
    }
    profiles = None if machine.profiles is None else str(machine.profiles)
    described = asdict(machine) | {"source": machine.source, "profiles": profiles}
    return json.dumps({"machine": described, "requests": requests, "series": asdict(series)}, indent=1) + "\n"


def _drawing() -> tuple[Callable[..., None], Mapping[str, Any]]:
    module = "rayserve_sarathi.simulation.figures.drawing"
    try:
        return import_object(f"{module}:save"), import_object(f"{module}:DRAWINGS")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "matplotlib":
            raise
        raise ConfigError("figures need matplotlib; pip install 'rayserve_sarathi[figures]'") from error


def _stalls(experiment: Experiment, settings: FigureSettings) -> StallSeries:
    rate = experiment.full_rate(settings.token_budget) / 2 if settings.rate is None else settings.rate
    return stalls(experiment, num_requests=_NUM_TIMELINE_REQUESTS, rate=rate, token_budget=settings.token_budget)


def pipeline_machine(machine: Machine) -> Machine:
    """Return the machine itself, or one with two such stages where it has only one."""
    return replace(machine, pipeline_parallel_size=max(machine.pipeline_parallel_size, 2))


def pipeline_workload(experiment: Experiment, token_budget: int) -> Workload:
    """Return few requests with unequal prompts and short outputs, so that steps can be told from each other.

    They come at four times the rate of full steps, so that prompts meet decodes.
    """
    drawn = experiment.workload(_NUM_PIPELINE_REQUESTS, 1.0)
    return Workload(
        arrivals_s=drawn.arrivals_s - drawn.arrivals_s[0],
        num_prompt_tokens=drawn.num_prompt_tokens,
        num_output_tokens=np.full(len(drawn), _PIPELINE_OUTPUT_TOKENS, dtype=np.int64),
        rate=drawn.rate,
    ).at_rate(4 * experiment.full_rate(token_budget))


def _bubbles(settings: FigureSettings) -> tuple[Machine, BubbleSeries]:
    machine = pipeline_machine(settings.machine)
    experiment = settings.experiment(machine)
    workload = pipeline_workload(experiment, settings.token_budget)
    return machine, bubbles(experiment, workload, token_budget=settings.token_budget)


def _of_model(compute: Callable[[CostModel], Series]) -> Compute:
    return lambda settings: (settings.machine, compute(settings.machine.step_times()))


def _of_experiment(compute: Callable[[Experiment, FigureSettings], Series]) -> Compute:
    return lambda settings: (settings.machine, compute(settings.experiment(settings.machine), settings))


SERIES: Mapping[str, Compute] = {
    "throughput": _of_model(throughput),
    "operators": _of_model(time_by_operator),
    "linear_layers": lambda settings: (
        settings.machine,
        linear_layers(settings.machine, settings.machine.step_times()),
    ),
    "chunking": _of_model(chunking),
    "stalls": _of_experiment(_stalls),
    "bubbles": _bubbles,
    "capacity": _of_experiment(
        lambda experiment, settings: capacity_bars(
            experiment, num_requests=settings.num_requests, budgets=settings.budgets
        )
    ),
    "capacity_by_target": _of_experiment(
        lambda experiment, settings: capacity_curves(
            experiment, num_requests=settings.num_requests, budgets=settings.budgets, has_auto=settings.has_auto
        )
    ),
}
"""By the name of the figure: the machine that it is about, and the series."""
SIMULATED = {"stalls", "bubbles", "capacity", "capacity_by_target"}
"""Those for which requests are simulated."""
