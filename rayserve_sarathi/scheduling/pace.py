"""The pace of a scheduler: its budgets, what its steps take, and the tokens that came late."""

from collections.abc import Sequence

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.metrics import SchedulerMetrics
from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.forecast import StepForecast
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport, LateTokens, longest_chunk
from rayserve_sarathi.scheduling.step_time import FittedStepTime, StepLoad, attention_work, prior_times
from rayserve_sarathi.scheduling.token_budget import AutoBudget
from rayserve_sarathi.step import StepOutput
from rayserve_sarathi.step_shape import StepTimeModel


class Pace:
    """Follows every step; a scheduler has one if its budget is `auto`, or if there is a target for its tokens.

    Args:
        config: The scheduler's; `slo` likewise.
        max_steps_in_flight: See `Scheduler`.
        num_stages: Of the pipeline.
        prior: What steps take, as far as that is known; it may be wrong by any factor.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        slo: SloConfig,
        *,
        max_steps_in_flight: int,
        num_stages: int,
        prior: StepTimeModel | None = None,
    ) -> None:
        self.forecast = StepForecast(
            FittedStepTime(prior_times(prior)), num_stages=num_stages, tbt_s=slo.tbt_s, quantile=slo.quantile
        )
        self.budget = AutoBudget(
            self.forecast, slo, max_tokens=config.max_token_budget, max_steps_in_flight=max_steps_in_flight
        )
        self._late = None if slo.tbt_s is None else LateTokens(slo.tbt_s)

    def submit(self, decodes: Sequence[Request], prefills: dict[Request, int], now_s: float) -> None:
        """Note a step before its tokens are counted as in flight."""
        num_decodes = len(decodes)
        context_tokens, work = sum([request.num_computed_tokens for request in decodes]), 0.0
        num_tokens = num_decodes
        for request, num_new in prefills.items():
            context_tokens += request.num_scheduled_tokens
            num_tokens += num_new
            if num_new > 1:
                work += attention_work(num_new, request.num_scheduled_tokens)
            else:
                num_decodes += 1
        self.forecast.submit(StepLoad(num_tokens, num_decodes, context_tokens, work), now_s)

    def land(
        self,
        decodes: Sequence[Request],
        prefills: dict[Request, int],
        sampled_prefills: Sequence[Request],
        output: StepOutput,
        metrics: SchedulerMetrics,
        now_s: float,
    ) -> None:
        """Learn from a step that is back, before its tokens are counted."""
        if output.fault is not None:
            self.forecast.forget()
            return
        step = self.forecast.land(output.timings, now_s)
        if step.expected_s > 0:
            metrics.step_time_prediction_error.observe((now_s - step.submit_s) / step.expected_s)
        if self._late is not None:
            causes = self._late.land(step, (*decodes, *sampled_prefills), culprit=longest_chunk(prefills), now_s=now_s)
            metrics.num_tbt_slo_violations.update(causes)

    def interrupt(self, request: Request, cause: str) -> None:
        """See `LateTokens.interrupt`."""
        if self._late is not None:
            self._late.interrupt(request, cause)

    def finish(self, request: Request) -> None:
        """Note that a request has ended."""
        if self._late is not None:
            self._late.forget(request)

    def restart(self) -> None:
        """Forget the steps in flight."""
        self.forecast.restart()

    @property
    def tbt_s(self) -> float | None:
        """The target of its tokens, in seconds."""
        return None if self._late is None else self._late.tbt_s

    def note_late(self, request_id: str, gap: LateGap, metrics: SchedulerMetrics) -> None:
        """Count a gap that others found."""
        if self._late is not None:
            self._late.note(request_id, gap)
            metrics.num_tbt_slo_violations[gap.cause] += 1

    def late_reports(self, request_id: str) -> list[LateReport]:
        """See `LateTokens.reports`."""
        return [] if self._late is None else self._late.reports(request_id)


def pace_of(
    config: SchedulerConfig,
    slo: SloConfig,
    *,
    max_steps_in_flight: int,
    num_stages: int,
    prior: StepTimeModel | None,
) -> Pace | None:
    """Return the pace of a scheduler, None if nothing asks for one."""
    if config.token_budget != "auto" and slo.tbt_s is None:
        return None
    return Pace(config, slo, max_steps_in_flight=max_steps_in_flight, num_stages=num_stages, prior=prior)
