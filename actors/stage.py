"""The actor of one pipeline stage: receive, compute, send."""

import os
from typing import TYPE_CHECKING

from rayserve_sarathi.actors.logs import log_to_stderr
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.registry import import_object
from rayserve_sarathi.step import StepInput, StepOutput

if TYPE_CHECKING:
    from rayserve_sarathi.execution.stage import Stage, StageMessage


class StageActor:
    """A `Stage` in a process of its own.

    Torch is loaded here and not with this module, which the scheduler's process imports to start stages.

    `load` is a call of its own, as an error in a constructor would reach the caller as text only.

    Args:
        config: The engine's.
        stage: Which stage, from 0.
        num_threads: Threads for the CPU's share of the work.
    """

    def __init__(self, config: EngineConfig, *, stage: int, num_threads: int) -> None:
        log_to_stderr()
        import_object("torch:set_num_threads")(num_threads)
        self._stage: Stage = import_object("rayserve_sarathi.execution.stage:Stage")(config, index=stage)

    def load(self) -> int:
        """Load the weights; return how many KV blocks there is room for.

        Raises:
            ConfigError: The weights are not to be had, or leave no room.
        """
        self._stage.load()
        return self._stage.fit()

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self._stage.start(num_blocks)

    def execute_first(self, step: StepInput) -> "StageMessage | StepOutput":
        """Compute the first stage's part of a step."""
        return self._stage.execute_first(step)

    def execute(self, message: "StageMessage") -> "StageMessage | StepOutput":
        """Compute this stage's part of a step."""
        return self._stage.execute(message)

    def pid(self) -> int:
        """Return the id of its process: a sign of life, and what an operator looks for."""
        return os.getpid()
