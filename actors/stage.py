"""The actor of one pipeline stage: receive, compute, send."""

import torch

from rayserve_sarathi.actors.logs import log_to_stderr
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import fit_num_blocks
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.execution.pipeline import StageMessage, run_stage
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.step import StepInput, StepOutput


class StageActor:
    """Weights, KV cache and kernels of one stage; it knows steps, not requests.

    It loads its weights when it is made; `start` then gives it a KV cache of the size that all stages agree on.

    Args:
        config: The engine's.
        stage: Which stage, from 0.
        num_threads: Threads for the CPU's share of the work.
    """

    def __init__(self, config: EngineConfig, *, stage: int, num_threads: int) -> None:
        log_to_stderr()
        torch.set_num_threads(num_threads)
        self._stage = stage
        self._block_size = config.block_size
        info = resolve_model(config)
        self._decoder = load_decoder(config, info, stage=stage)
        self._num_blocks = fit_num_blocks(config, info, self._decoder)
        self._runner: ModelRunner | None = None

    def num_blocks(self) -> int:
        """Return how many KV blocks there is room for."""
        return self._num_blocks

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self._runner = ModelRunner(self._decoder, num_blocks=num_blocks, block_size=self._block_size)

    def execute_first(self, step: StepInput) -> StageMessage | StepOutput:
        """Compute the first stage's part of a step."""
        return self.execute(StageMessage(step=step))

    def execute(self, message: StageMessage) -> StageMessage | StepOutput:
        """Compute this stage's part of a step."""
        assert self._runner is not None, "start comes before the first step"
        return run_stage(self._runner, message, stage=self._stage)

    def ping(self) -> None:
        """Return: the process lives."""
