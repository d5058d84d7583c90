"""What each stage of a pipeline does as time goes by, and when it waits, for each policy (paper, section 3.3)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.scheduling.plan import StepPlan
from rayserve_sarathi.simulation.figures.experiment import Experiment
from rayserve_sarathi.simulation.virtual_pipeline import Passage
from rayserve_sarathi.simulation.workload import Workload

POLICIES = ("faster_transformer", "orca", "vllm", "hybrid_only", "chunked_only", "sarathi")


@dataclass(frozen=True, slots=True, kw_only=True)
class Bar:
    """A step on a stage.

    Args:
        stage: Its number.
        start_s: When it began to compute.
        end_s: When it had computed.
        kind: What is in the step: `prefill`, `decode` or `mixed`.
        num_tokens: How many tokens.
    """

    stage: int
    start_s: float
    end_s: float
    kind: str
    num_tokens: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineTimeline:
    """Of one policy.

    Args:
        bars: All steps on all stages.
        duration_s: To the end of the last request.
        bubble_share: Of the time in which a step is in flight, the share that a stage does not compute; their mean.
    """

    bars: tuple[Bar, ...]
    duration_s: float
    bubble_share: float


@dataclass(frozen=True, slots=True, kw_only=True)
class BubbleSeries:
    """The same requests under each policy.

    Args:
        num_stages: Of the pipeline.
        token_budget: Of the policies that keep one.
        arrivals_s: When requests arrive.
        num_prompt_tokens: Their prompts.
        num_output_tokens: What they generate.
        timelines: By policy.
    """

    num_stages: int
    token_budget: int
    arrivals_s: tuple[float, ...]
    num_prompt_tokens: tuple[int, ...]
    num_output_tokens: tuple[int, ...]
    timelines: dict[str, PipelineTimeline]


def bubbles(
    experiment: Experiment, workload: Workload, *, token_budget: int, policies: Sequence[str] = POLICIES
) -> BubbleSeries:
    """Simulate each policy.

    Raises:
        ConfigError: See `Experiment.run`.
    """
    return BubbleSeries(
        num_stages=experiment.model.num_stages,
        token_budget=token_budget,
        arrivals_s=tuple(workload.arrivals_s.tolist()),
        num_prompt_tokens=tuple(workload.num_prompt_tokens.tolist()),
        num_output_tokens=tuple(workload.num_output_tokens.tolist()),
        timelines={policy: _timeline(experiment, workload, policy, token_budget) for policy in policies},
    )


def _timeline(experiment: Experiment, workload: Workload, policy: str, token_budget: int) -> PipelineTimeline:
    bars: list[Bar] = []

    def note_step(plan: StepPlan, submit_s: float, passage: Passage, back_s: float) -> None:
        kind = "mixed" if plan.decodes and plan.prefills else "decode" if plan.decodes else "prefill"
        bars.extend(
            Bar(stage=stage, start_s=start_s, end_s=end_s, kind=kind, num_tokens=plan.num_tokens)
            for stage, (_, start_s, end_s) in enumerate(passage)
        )

    result = experiment.run(workload, policy, token_budget=token_budget, note_step=note_step)
    shares = [stage.bubble_share for stage in result.stages]
    return PipelineTimeline(bars=tuple(bars), duration_s=result.duration_s, bubble_share=sum(shares) / len(shares))
