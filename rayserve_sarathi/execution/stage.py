"""One stage at work: what it holds, what it receives, and what it makes of a step."""

import logging
import time
from dataclasses import dataclass, replace

import numpy as np
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import fit_num_blocks
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.step import StageTiming, StepInput, StepOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMessage:
    """What one stage sends to the next.

    Args:
        step: The step, as the scheduler made it.
        hidden: Activations, [T, hidden size]; None on the way to the first stage, and after an error.
        timings: One entry for each stage that is done.
        error: Why a stage could not compute the step; those behind it pass it on.
    """

    step: StepInput
    hidden: torch.Tensor | None = None
    timings: tuple[StageTiming, ...] = ()
    error: str | None = None


class Stage:
    """Weights, KV cache and kernels of one stage; it knows steps, not requests.

    `load`, `fit` and `start` come before the first step: all stages agree on the size of their KV caches.

    Args:
        config: The engine's.
        index: Which stage, from 0.
    """

    def __init__(self, config: EngineConfig, *, index: int) -> None:
        self._config = config
        self._index = index
        self._decoder: Decoder | None = None
        self._runner: ModelRunner | None = None

    def load(self) -> None:
        """Load the weights.

        Raises:
            ConfigError: They are not to be had.
        """
        self._decoder = load_decoder(self._config, resolve_model(self._config), stage=self._index)

    def fit(self) -> int:
        """Return how many KV blocks there is room for, once all stages of this machine are loaded.

        Raises:
            ConfigError: Too few for the longest request.
        """
        assert self._decoder is not None, "load comes before fit"
        return fit_num_blocks(self._config, resolve_model(self._config), self._decoder)

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        assert self._decoder is not None, "load comes before start"
        self._runner = ModelRunner(self._decoder, num_blocks=num_blocks, block_size=self._config.block_size)

    def execute_first(self, step: StepInput) -> StageMessage | StepOutput:
        """Compute the first stage's part of a step."""
        return self.execute(StageMessage(step=step))

    def execute(self, message: StageMessage) -> StageMessage | StepOutput:
        """Compute this stage's part of a step; an exception becomes the error of this step and of no other."""
        runner = self._runner
        assert runner is not None, "start comes before the first step"
        receive_s = time.monotonic()
        step, error = message.step, message.error
        hidden: torch.Tensor | None = None
        output: StepOutput | None = None
        start_s = time.monotonic()
        if error is None:
            try:
                hidden = runner.forward(step, message.hidden)
                output = runner.sample(step, hidden) if runner.is_last else None
            except Exception as exception:  # the outermost frame of a stage: whatever it is, it fails this step alone
                logger.exception(
                    "stage %d failed in step %d of requests %s", self._index, step.step_id, step.request_ids
                )
                error = f"stage {self._index} failed with {type(exception).__name__}"
        timings = (
            *message.timings,
            StageTiming(stage=self._index, receive_s=receive_s, start_s=start_s, end_s=time.monotonic()),
        )
        if not runner.is_last:
            return StageMessage(step=step, hidden=hidden, timings=timings, error=error)
        if output is None:
            output = StepOutput(
                step_id=step.step_id, epoch=step.epoch, token_ids=np.empty(0, dtype=np.int32), error=error
            )
        return replace(output, timings=timings)
