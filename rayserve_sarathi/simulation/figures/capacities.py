"""Capacity by policy under a strict and a relaxed target, and against the target (paper, sections 5.1 and 5.2)."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import ceil
from typing import Literal

from rayserve_sarathi.config import TokenBudget
from rayserve_sarathi.simulation.capacity import find_capacity
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.figures.experiment import Experiment
from rayserve_sarathi.simulation.figures.machine import reference_decode_s
from rayserve_sarathi.simulation.result import SimulationResult

POLICIES = ("faster_transformer", "orca", "vllm", "hybrid_only", "chunked_only", "sarathi")
TARGETS = {"strict": 5.0, "relaxed": 25.0}
"""The paper's targets of the 99th percentile of TBT, in times of a reference decode step."""
BUDGETS = (512, 2048)
"""The paper's token budgets of the strict and the relaxed target, on A100s."""
MULTIPLES = (2.5, 5.0, 10.0, 25.0, 50.0)
_TOLERANCE = 0.05
_AUTO: Literal["auto"] = "auto"
_MIN_DELAYS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityBars:
    """Of each policy under each target.

    Args:
        num_requests: Of a run at least.
        tbt_s: The target, by its name.
        token_budgets: Of the policies that keep one, by the target's name.
        rates: Requests a second that a policy keeps up with, by the target's name and the policy.
    """

    num_requests: int
    tbt_s: dict[str, float]
    token_budgets: dict[str, int]
    rates: dict[str, dict[str, float]]


@dataclass(frozen=True, slots=True, kw_only=True)
class CapacityCurves:
    """Of each contender against the target.

    Args:
        num_requests: Of a run at least.
        tbt_s: Targets of the 99th percentile of TBT, ascending.
        rates: Requests a second at each target, by the contender.
    """

    num_requests: int
    tbt_s: tuple[float, ...]
    rates: dict[str, tuple[float, ...]]


def capacity_bars(
    experiment: Experiment,
    *,
    num_requests: int,
    policies: Sequence[str] = POLICIES,
    budgets: Sequence[int] = BUDGETS,
) -> CapacityBars:
    """Search the capacity of each policy under the paper's targets.

    Args:
        experiment: What to run.
        num_requests: Of a run at least.
        policies: To compare.
        budgets: Token budget for each of `TARGETS`.

    Raises:
        ConfigError: See `Experiment.run`.
    """
    reference_s = reference_decode_s(experiment.model)
    tbt_s = {name: multiple * reference_s for name, multiple in TARGETS.items()}
    token_budgets = dict(zip(TARGETS, budgets, strict=True))
    return CapacityBars(
        num_requests=num_requests,
        tbt_s=tbt_s,
        token_budgets=token_budgets,
        rates={
            name: {
                policy: capacity(
                    experiment, policy, token_budget=token_budgets[name], tbt_s=tbt_s[name], num_requests=num_requests
                )
                for policy in policies
            }
            for name in TARGETS
        },
    )


def capacity_curves(
    experiment: Experiment,
    *,
    num_requests: int,
    budgets: Sequence[int] = BUDGETS,
    multiples: Sequence[float] = MULTIPLES,
    has_auto: bool = False,
) -> CapacityCurves:
    """Search the capacity of `orca`, `vllm`, and `sarathi` with each budget, at each target.

    Args:
        experiment: What to run.
        num_requests: Of a run at least.
        budgets: Token budgets of `sarathi`.
        multiples: Targets in times of a reference decode step, ascending.
        has_auto: Whether `sarathi` is also to choose its budget from the target, which takes several times as long.

    Raises:
        ConfigError: See `Experiment.run`.
    """
    tbt_s = tuple(multiple * reference_decode_s(experiment.model) for multiple in multiples)
    curve_budgets: list[TokenBudget] = [*budgets, *([_AUTO] if has_auto else [])]
    # The first two keep no budget.
    contenders: dict[str, tuple[str, TokenBudget]] = {policy: (policy, budgets[0]) for policy in ("orca", "vllm")}
    contenders |= {f"sarathi, budget {budget}": ("sarathi", budget) for budget in curve_budgets}
    return CapacityCurves(
        num_requests=num_requests,
        tbt_s=tbt_s,
        rates={
            name: tuple(
                capacity(experiment, policy, token_budget=token_budget, tbt_s=target_s, num_requests=num_requests)
                for target_s in tbt_s
            )
            for name, (policy, token_budget) in contenders.items()
        },
    )


def capacity(
    experiment: Experiment, policy: str, *, token_budget: TokenBudget, tbt_s: float, num_requests: int
) -> float:
    """Return the largest rate, to 5%, at which the run keeps up.

    A run has `num_requests`, or more where these would come within 20 times the longest delay that is allowed.

    Raises:
        ConfigError: See `Experiment.run`.
    """
    criteria = Criteria(p99_tbt_s=tbt_s)
    min_duration_s = _MIN_DELAYS * criteria.median_scheduling_delay_s

    def run(rate: float) -> SimulationResult:
        # A queue that grows takes a while until half of the requests have waited too long in it.
        workload = experiment.workload(max(num_requests, ceil(rate * min_duration_s)), rate)
        return experiment.run(
            workload,
            policy,
            token_budget=token_budget,
            tbt_s=tbt_s if token_budget == _AUTO else None,
            give_up=criteria,
        )

    # Whether a short run keeps up does not only depend on the rate; beginning at the same one finds the same capacity.
    full_rate = experiment.full_rate(BUDGETS[0])
    return find_capacity(
        run,
        criteria.are_met,
        first_rate=full_rate / 2,
        min_rate=full_rate / 512,
        max_rate=full_rate * 64,
        tolerance=_TOLERANCE,
    ).rate
