"""Stages that compute nothing, for tests of messages."""

import threading
from dataclasses import replace

import numpy as np

from rayserve_sarathi.execution.stage import LaunchedStep, StageMessage
from rayserve_sarathi.execution.wire import MAX_HEADER_BYTES
from rayserve_sarathi.step import StageTiming, StepFault, StepInput, StepOutput
from tests.execution.wired import TIMEOUT_S, make_steps


class Relay:
    """A stage that passes on what it gets."""

    index = 0

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        assert receive_s is not None
        timing = StageTiming(stage=0, receive_s=receive_s, start_s=receive_s, end_s=receive_s)
        return replace(message, timings=(*message.timings, timing))


class LastRelay:
    """A last stage that turns what it gets into an output."""

    index = 1

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        return output_of(message.step, fault=message.fault)


class DeviceRelay(LastRelay):
    """A last stage with a device: the first step is done when the second one has been given to it."""

    def __init__(self) -> None:
        self.has_launched = threading.Event()

    def launch(self, message: StageMessage, receive_s: float | None = None) -> LaunchedStep:
        if message.step.step_id == 1:
            self.has_launched.set()
        output = output_of(message.step)
        return LaunchedStep(lambda: output if self.has_launched.wait(TIMEOUT_S) else replace(output, step_id=-1))


class VerboseRelay(LastRelay):
    """A last stage that has too much to say of the first step."""

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput:
        output = output_of(message.step)
        return output if output.step_id else replace(output, errors={0: "x" * MAX_HEADER_BYTES})


def output_of(step: StepInput, *, fault: StepFault | None = None) -> StepOutput:
    return StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=np.zeros(1, np.int32), fault=fault)


def make_step(step_id: int, *, epoch: int = 0) -> StepInput:
    return replace(make_steps(1, num_tokens=4)[0], step_id=step_id, epoch=epoch)
