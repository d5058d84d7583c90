"""Choose parallelism, token budget and number of replicas for a rate and a target: the figures of `sarathi plan`.

A replica is a pipeline with a scheduler of its own; of `n` each gets its share of the rate, as requests come
independently of each other. Whether a replica keeps up with its share is simulated, for every split of the model that
fits into memory and every token budget. The plan with the fewest devices is chosen, and of several the one with the
shortest P99 time between tokens; what takes more devices than one that is known already is not simulated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE, SchedulerConfig, SloConfig, TokenBudget
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.capacity import find_capacity
from rayserve_sarathi.simulation.fit import Fit, Parallelism, check_fit, parallelisms
from rayserve_sarathi.simulation.hardware import find_hardware
from rayserve_sarathi.simulation.model_shape import find_model
from rayserve_sarathi.simulation.plan_config import PlanConfig, Target
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.simulation.system import SimulatedSystem
from rayserve_sarathi.simulation.workload import Workload

_CAPACITY_TOLERANCE = 0.05
MAX_LOAD = 64
"""The capacity of a replica is sought up to so many times its share: beyond that it does not matter."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Option:
    """A way to meet the target.

    Args:
        parallelism: Of each replica.
        fit: What its ranks hold.
        token_budget: Of its scheduler.
        num_replicas: As few as keep up.
        rate: Requests a second of each.
        result: What one of them does at that rate.
    """

    parallelism: Parallelism
    fit: Fit
    token_budget: TokenBudget
    num_replicas: int
    rate: float
    result: SimulationResult

    @property
    def num_gpus(self) -> int:
        """Devices of all replicas."""
        return self.num_replicas * self.parallelism.num_gpus

    @property
    def cost(self) -> tuple[int, float]:
        """What to have little of: devices first, then the P99 time between tokens in seconds."""
        return self.num_gpus, self.result.p99_tbt_s


@dataclass(frozen=True, slots=True, kw_only=True)
class RuledOut:
    """A candidate that is none.

    Args:
        parallelism: Of a replica.
        token_budget: None where it does not matter.
        reason: Why, in words.
    """

    parallelism: Parallelism
    token_budget: TokenBudget | None
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """What was found.

    Args:
        chosen: The best option; None if there is no option.
        capacity: Largest rate, in requests a second, at which one of its replicas meets the target, sought up to
            `MAX_LOAD` times its share; 0 without any.
        candidates: All that there are, those with the fewest devices for a replica first.
    """

    chosen: Option | None
    capacity: float
    candidates: tuple[Option | RuledOut, ...]


def make_plan(
    config: PlanConfig,
    workload: Workload,
    target: Target,
    *,
    note: Callable[[str], None] = lambda text: None,
) -> Plan:
    """Find the plan with the fewest devices.

    Args:
        config: What it is for.
        workload: Requests of at most `max_model_len` tokens; their rate does not matter.
        target: What each replica must keep.
        note: Hears what is being looked at.

    Raises:
        ConfigError: The model or the hardware is not known, or was not measured.
    """
    search = _Search(config, workload, target, note)
    max_gpus = 1
    while not search.has_option and max_gpus < config.max_gpus:
        search.look_up_to(max_gpus)
        max_gpus *= 2
    if not search.has_option:
        search.look_up_to(config.max_gpus)
    return search.plan()


def fewest_replicas(
    run: Callable[[int], SimulationResult], target: Target, *, more_than: int, most: int
) -> tuple[int, SimulationResult]:
    """Return the fewest replicas that keep up, and what one of them does; or the most, and by what they do not.

    Args:
        run: Simulates one of so many replicas.
        target: What it must keep.
        more_than: So many are known not to keep up.
        most: More than that.
    """
    assert more_than < most, (more_than, most)
    result = run(most)
    if not target.are_met(result):
        return most, result
    low, high = more_than, most
    while high - low > 1:
        middle = (low + high) // 2
        if target.are_met(tried := run(middle)):
            high, result = middle, tried
        else:
            low = middle
    return high, result


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A split that fits and a token budget, ready to be simulated."""

    parallelism: Parallelism
    fit: Fit
    token_budget: TokenBudget
    system: SimulatedSystem


class _Search:
    """Looks for options with more and more devices: runs that are far from keeping up are cut short, and so cheap."""

    def __init__(self, config: PlanConfig, workload: Workload, target: Target, note: Callable[[str], None]) -> None:
        self._config = config
        self._workload = workload
        self._target = target
        self._note = note
        self._candidates: list[_Candidate] = []
        self._unfit: list[RuledOut] = []
        self._missed: dict[_Candidate, tuple[int, str]] = {}
        """Largest number of replicas that do not keep up, and why."""
        self._options: dict[_Candidate, Option] = {}
        decoder, hardware = find_model(config.model), find_hardware(config.hardware)
        for parallelism in parallelisms(hardware, max_stages=config.max_stages):
            try:
                fit = check_fit(
                    decoder,
                    hardware,
                    parallelism,
                    max_model_len=config.max_model_len,
                    block_size=DEFAULT_BLOCK_SIZE,
                    gpu_memory_utilization=config.gpu_memory_utilization,
                )
                self._candidates += _candidates(config, target, parallelism, fit)
            except ConfigError as error:
                self._unfit.append(RuledOut(parallelism=parallelism, token_budget=None, reason=str(error)))

    @property
    def has_option(self) -> bool:
        """Whether anything keeps up."""
        return bool(self._options)

    def look_up_to(self, max_gpus: int) -> None:
        """Find the option of each candidate, if it has one that takes no more devices than this and than the best."""
        self._note(f"plans of up to {max_gpus} device{'s' * (max_gpus > 1)}")
        for candidate in self._candidates:
            most = min(max_gpus, self._best_gpus(max_gpus)) // candidate.parallelism.num_gpus
            more_than, _ = self._missed.get(candidate, (0, ""))
            if most > more_than:
                self._judge(candidate, more_than=more_than, most=most)

    def plan(self) -> Plan:
        """Return what was found."""
        judged = tuple(self._outcome(candidate) for candidate in self._candidates)
        candidates = tuple(sorted((*self._unfit, *judged), key=_order))
        if not self._options:
            return Plan(chosen=None, capacity=0.0, candidates=candidates)
        candidate, option = min(self._options.items(), key=lambda item: item[1].cost)
        self._note("capacity of a replica")
        found = find_capacity(
            candidate.system.at_rates(self._workload, self._target.criteria),
            self._target.are_met,
            first_rate=option.rate,
            min_rate=option.rate,
            max_rate=MAX_LOAD * option.rate,
            tolerance=_CAPACITY_TOLERANCE,
        )
        return Plan(chosen=option, capacity=found.rate, candidates=candidates)

    def _judge(self, candidate: _Candidate, *, more_than: int, most: int) -> None:
        run_at = candidate.system.at_rates(self._workload, self._target.criteria)
        num_replicas, result = fewest_replicas(
            lambda number: run_at(self._config.rate / number), self._target, more_than=more_than, most=most
        )
        if not self._target.are_met(result):
            self._missed[candidate] = num_replicas, self._target.why_missed(result)
            return
        self._options[candidate] = Option(
            parallelism=candidate.parallelism,
            fit=candidate.fit,
            token_budget=candidate.token_budget,
            num_replicas=num_replicas,
            rate=self._config.rate / num_replicas,
            result=result,
        )

    def _best_gpus(self, default: int) -> int:
        return min((option.num_gpus for option in self._options.values()), default=default)

    def _outcome(self, candidate: _Candidate) -> Option | RuledOut:
        if (option := self._options.get(candidate)) is not None:
            return option
        num_gpus = candidate.parallelism.num_gpus
        if (missed := self._missed.get(candidate)) is not None:
            num_replicas, why = missed
            reason = f"{why} with {num_replicas} replica{'s' * (num_replicas > 1)} ({num_replicas * num_gpus} GPUs)"
        else:
            limit = "the best plan has" if self._options else "max_gpus is"
            reason = f"a replica has {num_gpus} GPUs, {limit} {self._best_gpus(self._config.max_gpus)}"
        return RuledOut(parallelism=candidate.parallelism, token_budget=candidate.token_budget, reason=reason)


def _candidates(config: PlanConfig, target: Target, parallelism: Parallelism, fit: Fit) -> list[_Candidate]:
    step_times = make_step_time_model(
        config.model,
        config.hardware,
        tensor_parallel_size=parallelism.tensor_parallel_size,
        pipeline_parallel_size=parallelism.pipeline_parallel_size,
        source="roofline" if config.profiles is None else "profile",
        profiles=config.profiles,
    )
    return [
        _Candidate(
            parallelism,
            fit,
            token_budget,
            SimulatedSystem(
                step_times,
                num_blocks=fit.num_blocks,
                block_size=DEFAULT_BLOCK_SIZE,
                max_model_len=config.max_model_len,
                scheduler=SchedulerConfig(token_budget=token_budget, max_num_seqs=config.max_num_seqs),
                slo=SloConfig(tbt_s=target.criteria.p99_tbt_s if token_budget == "auto" else None),
            ),
        )
        for token_budget in config.token_budgets
    ]


def _order(candidate: Option | RuledOut) -> tuple[int, int, float]:
    budget = candidate.token_budget or 0
    return (
        candidate.parallelism.num_gpus,
        candidate.parallelism.pipeline_parallel_size,
        math.inf if budget == "auto" else budget,
    )
