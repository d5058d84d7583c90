"""Simulated runs of a machine under one policy or another, on the same traffic."""

from dataclasses import dataclass

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE, SchedulerConfig, SloConfig, TokenBudget
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.figures.machine import interval_s
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.simulator import NoteStep
from rayserve_sarathi.simulation.system import SimulatedSystem
from rayserve_sarathi.simulation.workload import Lengths, LognormalLengths, Workload, make_workload
from rayserve_sarathi.step_shape import StepShape

_MAX_NUM_SEQS = 128
_MAX_NUM_RESERVING = 16
_SAMPLE_SIZE = 256
_RESERVING = {"orca", "faster_transformer"}


@dataclass(frozen=True, slots=True, kw_only=True)
class Experiment:
    """A machine and the requests that it gets.

    Policies that reserve memory for `max_model_len` tokens run at most 16 requests at once, as the paper's do
    (section 5), others 128.

    Args:
        model: Times of its steps.
        num_blocks: KV blocks of 16 tokens.
        max_model_len: Most tokens of a request; longer ones are left out of the traffic.
        lengths: Of requests.
        seed: Of lengths and arrivals.
    """

    model: CostModel
    num_blocks: int
    max_model_len: int
    lengths: Lengths | LognormalLengths
    seed: int = 0

    def workload(self, num_requests: int, rate: float) -> Workload:
        """Return the first requests, as Poisson arrivals of `rate` a second.

        Raises:
            ConfigError: No request is as short as `max_model_len`.
        """
        return make_workload(
            self.lengths,
            num_requests=num_requests,
            rate=rate,
            seed=self.seed,
            max_total_tokens=self.max_model_len,
        )

    def run(
        self,
        workload: Workload,
        policy: str,
        *,
        token_budget: TokenBudget,
        tbt_s: float | None = None,
        give_up: Criteria | None = None,
        keeps_token_times: bool = False,
        note_step: NoteStep | None = None,
    ) -> SimulationResult:
        """Simulate `workload` under `policy`; `tbt_s` is the target of a budget of `auto`. See `SimulatedSystem.run`.

        Raises:
            ConfigError: The KV blocks do not hold `max_model_len` tokens, or there is no such policy.
        """
        system = SimulatedSystem(
            self.model,
            num_blocks=self.num_blocks,
            block_size=DEFAULT_BLOCK_SIZE,
            max_model_len=self.max_model_len,
            scheduler=SchedulerConfig(
                policy=policy,
                token_budget=token_budget,
                max_num_seqs=_MAX_NUM_RESERVING if policy in _RESERVING else _MAX_NUM_SEQS,
            ),
            slo=SloConfig(tbt_s=tbt_s),
        )
        return system.run(workload, give_up=give_up, keeps_token_times=keeps_token_times, note_step=note_step)

    def full_rate(self, token_budget: int) -> float:
        """Return the requests a second at which steps of `token_budget` tokens would be full: a bound of any capacity.

        Requests get as many decodes and prompt tokens in a step as is the proportion of their lengths, but no more
        decodes than requests that may run, or than the KV cache holds.
        """
        sample = self.workload(_SAMPLE_SIZE, 1.0)
        prompt_len = float(sample.num_prompt_tokens.mean())
        output_len = float(sample.num_output_tokens.mean())
        context_len = int(prompt_len + output_len / 2)
        num_running = min(_MAX_NUM_SEQS, self.num_blocks * DEFAULT_BLOCK_SIZE // context_len)
        num_decodes = max(1, min(int(token_budget * output_len / (prompt_len + output_len)), num_running))
        step = StepShape(
            num_decodes=num_decodes,
            decode_context_tokens=num_decodes * context_len,
            chunks=((2 + int(num_decodes * prompt_len / output_len), int(prompt_len / 2)),),
            num_samples=num_decodes,
        )
        return num_decodes / output_len / interval_s(self.model, step)
