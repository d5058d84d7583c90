"""Capacity of sarathi over that of other policies, simulated, beside what Sarathi-Serve (OSDI'24, section 5) measured.

python benchmarks/paper.py [--quick] [--data DIR] [--json PATH]

Chat trace, Poisson arrivals, 2048 requests, median scheduling delay at most 2 s, P99 time between tokens at most the
target. A ratio is the mean over the seeds of the ratio with each seed. The step times are those of public profiles, and
nothing was fitted to these ratios. Without the profiles (see tests/measured_data.py) they are data sheets', and lengths
are drawn from the paper's own percentiles.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import Figure, write_report

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.simulation.capacity import Capacity, find_capacity
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.system import SimulatedSystem, make_system
from rayserve_sarathi.simulation.system_config import SystemConfig
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS, make_workload, read_trace
from tests.measured_data import data_folder

TRACE = "sharegpt_8k_filtered_stats_llama2_tokenizer.csv.gz"
NUM_REQUESTS = 2048
NUM_SEEDS = 3
MAX_MODEL_LEN = 8192
MAX_NUM_SEQS = 128


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """A limit of the P99 time between tokens, and the token budget that the paper takes under it."""

    tbt_s: float
    token_budget: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Deployment:
    """A model on the paper's machines: A100-80GB, pairs with NVLink, four a node, 100 Gbit/s between nodes.

    Args:
        orca_num_seqs: Most requests that Orca runs at once.
        first_rate: Where searches begin.
    """

    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    orca_num_seqs: int
    first_rate: float
    targets: dict[str, Target]


DEPLOYMENTS = {
    "mistral-7b": Deployment(
        orca_num_seqs=16,
        first_rate=2.0,
        targets={
            "strict": Target(tbt_s=0.1, token_budget=512),
            "relaxed": Target(tbt_s=0.5, token_budget=2048),
        },
    ),
    "yi-34b": Deployment(
        tensor_parallel_size=2,
        orca_num_seqs=16,
        first_rate=0.7,
        targets={
            "strict": Target(tbt_s=0.2, token_budget=512),
            "relaxed": Target(tbt_s=1.0, token_budget=2048),
        },
    ),
    "falcon-180b": Deployment(
        tensor_parallel_size=4,
        pipeline_parallel_size=2,
        orca_num_seqs=8,
        first_rate=0.3,
        targets={
            "strict": Target(tbt_s=1.0, token_budget=512),
            "relaxed": Target(tbt_s=5.0, token_budget=2048),
        },
    ),
}

PAPER = {
    "mistral-7b/strict/vllm": 2.6,
    "yi-34b/strict/vllm": 3.7,
    "yi-34b/strict/orca": 4.0,
    "yi-34b/relaxed/vllm": 1.65,
    "falcon-180b/strict/orca": 5.6,
    "falcon-180b/strict/vllm": 3.6,
    "falcon-180b/relaxed/vllm": 1.48,
}
"""Model, target, and the policy over which the ratio is."""

QUICK = (
    "mistral-7b/strict/vllm",
    "yi-34b/strict/vllm",
    "yi-34b/strict/orca",
    "yi-34b/relaxed/vllm",
    "falcon-180b/strict/orca",
)


class Search(NamedTuple):
    """A capacity to find: of a deployment with a target under a policy, for the requests of a seed."""

    model: str
    target: str
    policy: str
    seed: int


class Found(NamedTuple):
    """A capacity in requests a second, and the idle share of each stage at it."""

    rate: float
    idle_shares: tuple[float, ...]


def search(what: Search, data: Path | None) -> Found:
    """Find a capacity.

    Args:
        what: Of what.
        data: Folder with `profiles/` and `traces/`; None takes data sheets and fitted lengths.
    """
    deployment = DEPLOYMENTS[what.model]
    target = deployment.targets[what.target]
    scheduler = SchedulerConfig(
        policy=what.policy,
        token_budget=target.token_budget,
        max_num_seqs=deployment.orca_num_seqs if what.policy == "orca" else MAX_NUM_SEQS,
    )
    found = find_system_capacity(
        make_system(system_config(what.model, scheduler, data)), deployment, target, seed=what.seed, data=data
    )
    assert found.best is not None, f"{what} keeps up at no rate"
    return Found(found.rate, tuple(stage.bubble_share for stage in found.best.result.stages))


def system_config(
    model: str, scheduler: SchedulerConfig, data: Path | None, *, slo: SloConfig | None = None
) -> SystemConfig:
    """Return a model on the paper's machine under a policy; `data` as in `search`."""
    deployment = DEPLOYMENTS[model]
    return SystemConfig(
        model=model,
        hardware="a100",
        tensor_parallel_size=deployment.tensor_parallel_size,
        pipeline_parallel_size=deployment.pipeline_parallel_size,
        profiles=None if data is None else data / "profiles",
        max_model_len=MAX_MODEL_LEN,
        scheduler=scheduler,
        slo=slo or SloConfig(),
    )


def find_system_capacity(
    system: SimulatedSystem,
    deployment: Deployment,
    target: Target,
    *,
    seed: int,
    data: Path | None,
    tolerance: float = 0.025,
    min_rate: float = 0.01,
) -> Capacity[SimulationResult]:
    """Return the capacity of a system for the chat trace, or what was fitted to it; `data` as in `search`."""
    lengths = SHAREGPT_LENGTHS if data is None else read_trace(data / "traces" / TRACE)
    workload = make_workload(lengths, num_requests=NUM_REQUESTS, seed=seed, max_total_tokens=MAX_MODEL_LEN)
    criteria = Criteria(p99_tbt_s=target.tbt_s)
    return find_capacity(
        system.at_rates(workload, criteria),
        criteria.are_met,
        first_rate=deployment.first_rate,
        min_rate=min_rate,
        tolerance=tolerance,
    )


def searches_for(names: Iterable[str], num_seeds: int) -> list[Search]:
    """Return what must be found for the ratios of these names, the longest searches first."""
    needed = {
        Search(model, target, one, seed)
        for model, target, policy in (name.split("/") for name in names)
        for one in ("sarathi", policy)
        for seed in range(num_seeds)
    }
    return sorted(
        needed, key=lambda what: (-DEPLOYMENTS[what.model].pipeline_parallel_size, what.policy != "orca", what)
    )


def main() -> None:
    """Search, and write ratios, capacities and idle times."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="one seed, and only the ratios that are promised")
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder with profiles/ and traces/")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    num_seeds = 1 if arguments.quick else NUM_SEEDS
    names = QUICK if arguments.quick else tuple(PAPER)
    todo = searches_for(names, num_seeds)
    begin_s = time.perf_counter()
    with ProcessPoolExecutor(len(os.sched_getaffinity(0))) as pool:
        found = dict(zip(todo, pool.map(partial(search, data=arguments.data), todo), strict=True))
    ratios: dict[str, float] = {}
    for name in names:
        model, target, policy = name.split("/")
        singles = [
            found[Search(model, target, "sarathi", seed)].rate / found[Search(model, target, policy, seed)].rate
            for seed in range(num_seeds)
        ]
        ratios[name] = statistics.mean(singles)
        spread = f" ({min(singles):.2f} to {max(singles):.2f})" if num_seeds > 1 else ""
        sys.stdout.write(f"{name:<26} simulated {ratios[name]:.2f}{spread}   paper {PAPER[name]}\n")
    capacities: dict[str, Figure] = {}
    idle: dict[str, Figure] = {}
    for what in sorted(found):
        if what.seed == 0:
            same = [found[what._replace(seed=seed)] for seed in range(num_seeds)]
            name = "/".join(what[:3])
            capacities[name] = statistics.mean(each.rate for each in same)
            idle[name] = [statistics.mean(shares) for shares in zip(*(each.idle_shares for each in same), strict=True)]
    write_report(
        {
            "step_times": "data sheets" if arguments.data is None else "public profiles",
            "num_requests": NUM_REQUESTS,
            "num_seeds": num_seeds,
            "ratios": ratios,
            "paper": {name: PAPER[name] for name in ratios},
            "capacity_requests_per_s": capacities,
            "stage_idle_share_at_capacity": idle,
            "took_s": time.perf_counter() - begin_s,
        },
        path=arguments.json,
    )


if __name__ == "__main__":
    main()
