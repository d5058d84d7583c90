"""`token_budget: auto` beside a sweep of fixed budgets: simulated capacity, on the paper's machines and chat trace.

python benchmarks/auto_budget.py [--quick] [--data DIR] [--json PATH]

Capacity as in `paper.py`, found to 1%. `auto` is told the target and nothing else; it learns what steps take as they
come back. What it believes at first is nothing in particular, or the roofline of the data sheet, wrong by a factor of
two in either direction.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from itertools import islice, product
from pathlib import Path
from typing import Literal, NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parent))
from paper import DEPLOYMENTS, MAX_NUM_SEQS, NUM_SEEDS, find_system_capacity, system_config
from report import Figure, write_report

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.simulation.system import make_system
from rayserve_sarathi.step_shape import StepShape, StepTimeModel
from tests.measured_data import data_folder

CASES = ("mistral-7b/strict", "mistral-7b/relaxed", "yi-34b/strict", "yi-34b/relaxed")
PIPELINE_CASES = ("falcon-180b/strict", "falcon-180b/relaxed")
TOLERANCE = 0.01
WORTHLESS = 0.5
"""Of the rate where searches begin: what does not keep up at this counts as 0, however slow it is."""


class ScaledModel:
    """What another model says, times a factor.

    Args:
        model: The other one.
        factor: Of all times.
    """

    def __init__(self, model: StepTimeModel, factor: float) -> None:
        self._model = model
        self._factor = factor
        self.num_stages = model.num_stages

    def stage_times_s(self, shape: StepShape) -> Sequence[float]:
        """See `StepTimeModel`."""
        return [self._factor * seconds for seconds in self._model.stage_times_s(shape)]

    def transfer_s(self, shape: StepShape) -> float:
        """See `StepTimeModel`."""
        return self._factor * self._model.transfer_s(shape)

    def cpu_s(self, shape: StepShape) -> float:
        """See `StepTimeModel`."""
        return self._factor * self._model.cpu_s(shape)


class Budget(NamedTuple):
    """A budget, and for `auto` the factor by which the roofline is wrong that it starts from; None for no roofline."""

    tokens: int | Literal["auto"]
    factor: float | None = None


FIXED = tuple(map(Budget, (384, 512, 640, 768, 1024, 1536, 2048)))
AUTO = {"auto": Budget("auto"), "from roofline x 0.5": Budget("auto", 0.5), "x 2": Budget("auto", 2.0)}


class Search(NamedTuple):
    """A capacity to find: of a model and target, for the requests of a seed."""

    case: str
    budget: Budget
    seed: int


def search(what: Search, data: Path | None) -> float:
    """Return a capacity in requests a second; `data` as in `paper.search`."""
    model, _, name = what.case.partition("/")
    deployment = DEPLOYMENTS[model]
    target = deployment.targets[name]
    prior = None
    if what.budget.factor is not None:
        roofline = make_step_time_model(
            model,
            "a100",
            tensor_parallel_size=deployment.tensor_parallel_size,
            pipeline_parallel_size=deployment.pipeline_parallel_size,
        )
        prior = ScaledModel(roofline, what.budget.factor)
    scheduler = SchedulerConfig(token_budget=what.budget.tokens, max_num_seqs=MAX_NUM_SEQS)
    system = make_system(system_config(model, scheduler, data, slo=SloConfig(tbt_s=target.tbt_s)), prior=prior)
    return find_system_capacity(
        system,
        deployment,
        target,
        seed=what.seed,
        data=data,
        tolerance=TOLERANCE,
        min_rate=WORTHLESS * deployment.first_rate,
    ).rate


def main() -> None:
    """Search, and write capacities and what `auto` reaches of the best fixed budget's."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and no pipeline")
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder with profiles/ and traces/")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    cases = CASES if arguments.quick else CASES + PIPELINE_CASES
    seeds = range(1 if arguments.quick else NUM_SEEDS)
    budgets = (*FIXED, *AUTO.values())
    begin_s = time.perf_counter()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        todo = [Search(*each) for each in product(cases, budgets, seeds)]
        found = zip(todo, pool.map(partial(search, data=arguments.data), todo), strict=True)
        capacities, shares = tell(cases, budgets, seeds, found)
    figures: dict[str, Figure] = {
        "step_times": "data sheets" if arguments.data is None else "public profiles",
        "num_seeds": len(seeds),
        "capacity_requests_per_s": capacities,
        "share_of_best_fixed": shares,
        "took_s": time.perf_counter() - begin_s,
    }
    write_report(figures, path=arguments.json)


def tell(
    cases: Sequence[str], budgets: Sequence[Budget], seeds: range, found: Iterator[tuple[Search, float]]
) -> tuple[dict[str, dict[str, float]], dict[str, dict[str, float]]]:
    """Write a line for each case as soon as its capacities are `found`; return them, and what `auto` reaches."""
    capacities: dict[str, dict[str, float]] = {}
    shares: dict[str, dict[str, float]] = {}
    for case in cases:
        rates = dict(islice(found, len(budgets) * len(seeds)))
        means = {budget: statistics.mean(rates[Search(case, budget, seed)] for seed in seeds) for budget in budgets}
        best = max(FIXED, key=lambda budget: means[budget])
        model, _, target = case.partition("/")
        own = Budget(DEPLOYMENTS[model].targets[target].token_budget)
        auto = {name: means[budget] for name, budget in AUTO.items()}
        capacities[case] = {str(budget.tokens): means[budget] for budget in FIXED} | auto
        shares[case] = {name: rate / means[best] for name, rate in auto.items()}
        told = "   ".join(f"{name} {rate:.3f} ({shares[case][name]:.1%})" for name, rate in auto.items())
        fixed = f"best fixed ({best.tokens}) {means[best]:.3f}   the paper's ({own.tokens}) {means[own]:.3f}"
        sys.stdout.write(f"{case:<20} {fixed}   {told}\n")
        sys.stdout.flush()
    return capacities, shares


if __name__ == "__main__":
    main()
