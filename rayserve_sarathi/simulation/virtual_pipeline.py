"""What stands for the stages in a simulation: tells when a step passes each of them."""

from collections.abc import Iterable
from typing import Protocol

from rayserve_sarathi.step_shape import StepShape, StepTimeModel

Passage = tuple[tuple[float, float, float], ...]
"""When each stage received, began and ended a step, as in `step_log.StepRecord.stages`."""


class VirtualPipeline(Protocol):
    """Takes steps in the order in which they are submitted, and returns them in that order."""

    @property
    def num_stages(self) -> int:
        """Stages that a step passes."""

    def submit(self, shape: StepShape, now_s: float) -> tuple[Passage, float]:
        """Take a step.

        Args:
            shape: Of the step.
            now_s: When the scheduler made it; it never goes back.

        Returns:
            When each stage has the step, and when it is back at the scheduler.
        """


class ModelledPipeline:
    """Stages whose times a model predicts.

    The scheduler prepares one step after another (`cpu_s`), each from when it is made. A stage computes a step as soon
    as it has it and is free; sending it on takes `transfer_s` and occupies neither stage. It is back with the end of
    the last one.

    Args:
        model: The times.
    """

    def __init__(self, model: StepTimeModel) -> None:
        self._model = model
        self.num_stages = model.num_stages
        self._cpu_free_s = 0.0
        self._free_s = [0.0] * model.num_stages

    def submit(self, shape: StepShape, now_s: float) -> tuple[Passage, float]:
        """See `VirtualPipeline`."""
        model, free_s = self._model, self._free_s
        self._cpu_free_s = receive_s = max(self._cpu_free_s, now_s) + model.cpu_s(shape)
        transfer_s = model.transfer_s(shape) if self.num_stages > 1 else 0.0
        passage = []
        end_s = receive_s
        for stage, time_s in enumerate(model.stage_times_s(shape)):
            start_s = max(receive_s, free_s[stage])
            free_s[stage] = end_s = start_s + time_s
            passage.append((receive_s, start_s, end_s))
            receive_s = end_s + transfer_s
        return tuple(passage), end_s


class RecordedPipeline:
    """Stages that take as long as they did: steps come back when a recorded run's did.

    Args:
        num_stages: Of the recorded pipeline.
        passages: The stages' times, on the scheduler's clock, and the time when the step was back, of each step in the
            order of submission.
    """

    def __init__(self, num_stages: int, passages: Iterable[tuple[Passage, float]]) -> None:
        self.num_stages = num_stages
        self._passages = iter(passages)

    def submit(self, shape: StepShape, now_s: float) -> tuple[Passage, float]:
        """See `VirtualPipeline`; there must be a recorded step left, which came back later than `now_s`."""
        del shape
        passage, back_s = next(self._passages)
        assert back_s >= now_s, f"a step submitted at {now_s} was back at {back_s}"
        return passage, back_s
