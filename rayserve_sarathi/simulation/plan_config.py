"""What a plan is for and what it must keep, apart from what finds it: commands read options without loading models."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from rayserve_sarathi.config import TokenBudget
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.result import SimulationResult

TOKEN_BUDGETS: tuple[TokenBudget, ...] = (256, 512, 1024, 2048, "auto")
"""Multiples of the tiles in which matrices are multiplied, and what is chosen every step for the target."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """What a replica must keep.

    Args:
        criteria: For gaps between tokens and scheduling delay; a run that cannot meet them any more is cut short.
        p90_ttft_s: Most for the time to first token of nine requests of ten; None sets no limit.

    Raises:
        ConfigError: The limit is not greater than 0.
    """

    criteria: Criteria
    p90_ttft_s: float | None = None

    def __post_init__(self) -> None:
        if self.p90_ttft_s is not None and not self.p90_ttft_s > 0:
            raise ConfigError(f"p90_ttft_s must be greater than 0, got {self.p90_ttft_s}")

    def are_met(self, result: SimulationResult) -> bool:
        """Whether the run kept up."""
        return self.criteria.are_met(result) and (self.p90_ttft_s is None or p90_ttft_s(result) <= self.p90_ttft_s)

    def why_missed(self, result: SimulationResult) -> str:
        """Return which limit a run that did not keep up has broken."""
        criteria = self.criteria
        if result.p99_tbt_s > criteria.p99_tbt_s:
            return f"P99 TBT over {criteria.p99_tbt_s:g} s"
        if result.median_scheduling_delay_s > criteria.median_scheduling_delay_s:
            return f"median scheduling delay over {criteria.median_scheduling_delay_s:g} s"
        return f"P90 TTFT over {self.p90_ttft_s:g} s"


def p90_ttft_s(result: SimulationResult) -> float:
    """Return the time to first token that one request of ten exceeds; infinite if the run was given up."""
    return float(np.quantile(result.ttft_s, 0.9)) if result.is_complete else float("inf")


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanConfig:
    """What a plan is for.

    Args:
        model: See `model_shape.find_model`.
        hardware: See `hardware.HARDWARE`.
        profiles: Folder of measured step times; None takes data sheets.
        rate: Requests a second of all replicas together.
        max_model_len: Most tokens of a request.
        max_num_seqs: Requests that run at once on a replica.
        token_budgets: To choose from.
        max_gpus: Of all replicas.
        max_stages: Of a pipeline.
        gpu_memory_utilization: Share of a device's memory that may be taken.

    Raises:
        ConfigError: A number is out of range.
    """

    model: str
    hardware: str
    rate: float
    max_model_len: int
    profiles: Path | None = None
    max_num_seqs: int = 128
    token_budgets: tuple[TokenBudget, ...] = TOKEN_BUDGETS
    max_gpus: int = 64
    max_stages: int = 4
    gpu_memory_utilization: float = 0.9

    def __post_init__(self) -> None:
        for name in ("max_model_len", "max_num_seqs", "max_gpus", "max_stages"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.token_budgets or any(budget != "auto" and budget < 1 for budget in self.token_budgets):
            raise ConfigError(f"token_budgets must be numbers of at least 1 or auto, got {list(self.token_budgets)}")
        if not 0 < self.rate < float("inf"):
            raise ConfigError(f"rate must be a number of requests a second greater than 0, got {self.rate}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be greater than 0 and at most 1, got {self.gpu_memory_utilization}"
            )
