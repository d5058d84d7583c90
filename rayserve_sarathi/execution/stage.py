"""One stage at work, or a rank of it: what it holds, what it receives, and what it makes of a step."""

import logging
import math
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from typing import NamedTuple

import numpy as np
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.execution.cuda_graphs import StepLimits
from rayserve_sarathi.execution.kv_cache import fit_num_blocks
from rayserve_sarathi.execution.model_runner import ModelRunner, PendingOutput, StepLogits
from rayserve_sarathi.kernels.layers import StageRun
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.parallel import SINGLE_RANK, TensorParallel
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.step import StageTiming, StepFault, StepInput, StepOutput

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StageMessage:
    """What one stage sends to the next.

    Args:
        step: The step, as the scheduler made it.
        hidden: Activations, [T, hidden size]; None on the way to the first stage, and after an error.
        timings: One entry for each stage that is done.
        fault: Why a stage could not compute the step; those behind it pass it on.
    """

    step: StepInput
    hidden: torch.Tensor | None = None
    timings: tuple[StageTiming, ...] = ()
    fault: StepFault | None = None


class LaunchedStep(NamedTuple):
    """A step of the last stage that a device may still be at.

    Args:
        wait: Returns what comes of it; one thread, which may be another one, calls it for one step after another.
        run: What it waits for, if the C++ kernels compute the step, so that an event loop may wait in its place.
    """

    wait: Callable[[], StepOutput]
    run: StageRun | None = None


class Stage:
    """Weights, KV cache and kernels of one stage, or of a rank of it; it knows steps, not requests.

    `load`, `fit` and `start` come before the first step: all stages agree on the size of their KV caches.
    All ranks of a stage get the same steps in the same order; hidden states are the same on all of them, so a rank
    sends its own to the same rank of the next stage. Of the last stage only rank 0's outputs hold tokens.

    Args:
        config: The engine's.
        index: Which stage, from 0.
        tp: Which of its `tensor_parallel_size` ranks, and the way to the others.
        on_leave: Called each time that a fault has made this rank leave the others; None where they notice it.

    Raises:
        ConfigError: The model cannot be found, or cannot do what is asked for.
    """

    def __init__(
        self,
        config: EngineConfig,
        *,
        index: int,
        tp: TensorParallel = SINGLE_RANK,
        on_leave: Callable[[], None] | None = None,
    ) -> None:
        self._config = config
        self._info = resolve_model(config)
        self._index = index
        self._tp = tp
        self._on_leave = on_leave
        self._decoder: Decoder | None = None
        self._runner: ModelRunner | None = None
        self._last_end_s = -math.inf

    @property
    def index(self) -> int:
        """Which stage, from 0."""
        return self._index

    def load(self) -> None:
        """Load the weights.

        Raises:
            ConfigError: They are not to be had.
        """
        # In a thread that ends: OpenMP keeps threads for each that computed, and lets none wait actively where there
        # are more than cores, which made each step on a CPU a quarter longer.
        with ThreadPoolExecutor(1) as passing:
            loading = passing.submit(load_decoder, self._config, self._info, stage=self._index, tp=self._tp)
            self._decoder = loading.result()

    def fit(self) -> int:
        """Return how many KV blocks there is room for, once all stages of this machine are loaded.

        Raises:
            ConfigError: Too few for the longest request.
        """
        assert self._decoder is not None, "load comes before fit"
        return fit_num_blocks(self._config, self._info, self._decoder)

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache and, on a GPU, record CUDA graphs."""
        assert self._decoder is not None, "load comes before start"
        config = self._config
        limits = StepLimits(
            num_tokens=config.scheduler.max_step_tokens,
            num_seqs=config.scheduler.max_num_seqs,
            model_len=self._info.max_model_len,
        )
        self._runner = ModelRunner(
            self._decoder,
            num_blocks=num_blocks,
            block_size=config.block_size,
            graph_limits=None if config.enforce_eager else limits,
        )

    def returns_at_once(self, step: StepInput) -> bool:
        """Whether `launch` computes nothing of this step itself; see `ModelRunner`."""
        return self._runner is not None and self._runner.returns_at_once(step)

    def execute_first(self, step: StepInput) -> StageMessage | StepOutput:
        """Compute the first stage's part of a step."""
        return self.execute(StageMessage(step=step))

    def execute(self, message: StageMessage) -> StageMessage | StepOutput:
        """Do what `launch` does, and wait for what comes of it."""
        launched = self.launch(message)
        return launched.wait() if isinstance(launched, LaunchedStep) else launched

    def launch(
        self, message: StageMessage, receive_s: float | None = None
    ) -> "StageMessage | StepOutput | LaunchedStep":
        """Compute this stage's part of a step; an exception becomes the fault of this step.

        It is the fault of no other step, but where ranks share the stage: the others may wait for what this one did
        not send, so it leaves them, which fails the step for all, and the stage must be replaced. So it does with such
        a fault of a stage before, as its peers may have got the step whole.

        Args:
            message: The step, and what the stages before made of it.
            receive_s: When the message had arrived; None if it has just arrived.

        Returns:
            What to send on, or of the last stage what to wait for, as the next step may be launched meanwhile.
        """
        runner = self._runner
        assert runner is not None, "start comes before the first step"
        receive_s = time.monotonic() if receive_s is None else receive_s
        step, fault = message.step, message.fault
        hidden: torch.Tensor | None = None
        pending: PendingOutput | None = None
        start_s = time.monotonic()
        if fault is None:
            has_peers_waiting = self._tp.tp_size > 1
            try:
                made = runner.compute(step, message.hidden)
                if isinstance(made, StepLogits | StageRun):
                    has_peers_waiting = False
                    pending = runner.sample(step, made)
                else:
                    hidden = made
            except Exception as exception:  # the outermost frame of a stage: whatever it is, it fails this step alone
                fault = self._make_fault(step, exception, is_stage_broken=has_peers_waiting)
        self._leave_others(fault)
        if runner.is_last:
            finish = partial(self._finish, message, pending, fault, receive_s=receive_s, start_s=start_s)
            return LaunchedStep(finish, None if pending is None else pending.run) if runner.is_async else finish()
        return StageMessage(
            step=step, hidden=hidden, timings=self._time(message, receive_s, start_s, time.monotonic()), fault=fault
        )

    def _finish(
        self,
        message: StageMessage,
        pending: PendingOutput | None,
        fault: StepFault | None,
        *,
        receive_s: float,
        start_s: float,
    ) -> StepOutput:
        step = message.step
        output = StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=np.empty(0, dtype=np.int32))
        if pending is not None:
            try:
                output = pending.wait()
            except Exception as exception:  # as in `launch`: what a device cannot do, it tells when it is waited for
                fault = self._make_fault(step, exception, is_stage_broken=False)
                self._leave_others(fault)
        end_s = time.monotonic()
        if pending is not None and pending.run is not None:
            start_s, end_s = pending.run.times_s
        return replace(output, fault=fault, timings=self._time(message, receive_s, start_s, end_s))

    def _leave_others(self, fault: StepFault | None) -> None:
        if fault is not None and fault.is_stage_broken and self._tp.tp_size > 1:
            self._tp.close()
            if self._on_leave is not None:
                self._on_leave()

    def _time(self, message: StageMessage, receive_s: float, start_s: float, end_s: float) -> tuple[StageTiming, ...]:
        """Return the timings of a step; one launched behind another began when that one ended, or was seen to end."""
        start_s = max(start_s, self._last_end_s)
        self._last_end_s = max(start_s, end_s)
        timing = StageTiming(stage=self._index, receive_s=receive_s, start_s=start_s, end_s=self._last_end_s)
        return (*message.timings, timing)

    def _make_fault(self, step: StepInput, exception: Exception, *, is_stage_broken: bool) -> StepFault:
        """Log an exception; return what the scheduler is told."""
        # After an error of the device, such as an illegal access, CUDA fails whatever this process calls.
        is_stage_broken = is_stage_broken or isinstance(exception, torch.AcceleratorError)
        rank = f"stage {self._index}, rank {self._tp.tp_rank}"
        logger.error("%s failed in step %d of requests %s", rank, step.step_id, step.request_ids, exc_info=exception)
        if isinstance(exception, EngineDeadError):
            what = f"{rank} lost another rank of its stage; the logs of the other ranks say why"
        else:
            what = f"{rank if self._tp.tp_size > 1 else f'stage {self._index}'} failed with {type(exception).__name__}"
        return StepFault(
            message=what,
            stage=self._index,
            is_stage_broken=is_stage_broken,
            is_consequence=isinstance(exception, EngineDeadError),
        )
