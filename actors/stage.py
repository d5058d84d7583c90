"""The actor of one pipeline stage: receive, compute, send."""

import os

import torch

from rayserve_sarathi.actors.logs import log_to_stderr
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import fit_num_blocks
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.execution.pipeline import StageMessage, run_stage
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.step import StepInput, StepOutput


class StageActor:
    """Weights, KV cache and kernels of one stage; it knows steps, not requests.

    `load` and `start` come before the first step. They are calls of their own, as an error in a constructor would reach
    the caller as text only, and as the size of the KV cache is agreed on by all stages.

    Args:
        config: The engine's.
        stage: Which stage, from 0.
        num_threads: Threads for the CPU's share of the work.
    """

    def __init__(self, config: EngineConfig, *, stage: int, num_threads: int) -> None:
        log_to_stderr()
        torch.set_num_threads(num_threads)
        self._config = config
        self._stage = stage
        self._decoder: Decoder | None = None
        self._runner: ModelRunner | None = None

    def load(self) -> int:
        """Load the weights; return how many KV blocks there is room for.

        Raises:
            ConfigError: The weights are not to be had, or leave no room.
        """
        info = resolve_model(self._config)
        self._decoder = load_decoder(self._config, info, stage=self._stage)
        return fit_num_blocks(self._config, info, self._decoder)

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        assert self._decoder is not None, "load comes before start"
        self._runner = ModelRunner(self._decoder, num_blocks=num_blocks, block_size=self._config.block_size)

    def execute_first(self, step: StepInput) -> StageMessage | StepOutput:
        """Compute the first stage's part of a step."""
        return self.execute(StageMessage(step=step))

    def execute(self, message: StageMessage) -> StageMessage | StepOutput:
        """Compute this stage's part of a step."""
        assert self._runner is not None, "start comes before the first step"
        return run_stage(self._runner, message, stage=self._stage)

    def pid(self) -> int:
        """Return the id of its process: a sign of life, and what an operator looks for."""
        return os.getpid()
