"""Times the parts of steps on a stage of a single rank that has the whole model."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from statistics import median
from typing import TypeVar

import torch
from torch import Tensor

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.model_input import build_model_input
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from rayserve_sarathi.step import StepInput

_T = TypeVar("_T")

_FILL_TOKENS = 512
_REST_S = 0.02


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTimes:
    """Seconds of a step's parts; they are parts of what a `Stage` takes for it.

    Args:
        prepare_s: Tensors out of the message; 0 where one kernel computes all layers, in which this then is.
        embed_s: Tokens looked up; likewise.
        attention_s: Of all layers.
        layers_s: What else the layers take.
        sample_s: Head and sampler, by themselves, also where a stage has the head in that kernel.
    """

    prepare_s: float
    embed_s: float
    attention_s: float
    layers_s: float
    sample_s: float

    @property
    def total_s(self) -> float:
        """The step's time on the stage."""
        return self.prepare_s + self.embed_s + self.attention_s + self.layers_s + self.sample_s


@dataclass(frozen=True, slots=True, kw_only=True)
class ClockTimes:
    """What the clock reads for a step, in seconds.

    Args:
        prepare_s: As in `StepTimes`; `embed_s`, `attention_s` and `sample_s` likewise.
        forward_s: From the message to the last hidden states, all of the former but the sampling in it.
    """

    prepare_s: float
    embed_s: float
    forward_s: float
    attention_s: float
    sample_s: float


def parts_of(readings: Sequence[ClockTimes]) -> StepTimes:
    """Return the parts of a step that was timed several times.

    Of each reading the median counts, which is what a run sees of the machine: what else runs on it adds to most
    readings a little. The rest of the layers is a difference of such medians, and not the median of differences.
    """
    prepare_s, embed_s, forward_s, attention_s, sample_s = (
        median(getattr(reading, field.name) for reading in readings) for field in fields(ClockTimes)
    )
    attention_s = min(attention_s, forward_s)
    return StepTimes(
        prepare_s=prepare_s,
        embed_s=embed_s,
        attention_s=attention_s,
        layers_s=max(0.0, forward_s - attention_s - prepare_s - embed_s),
        sample_s=sample_s,
    )


class StageClock:
    """The runner of a stage, and a clock that waits for its device.

    Args:
        config: One stage of one rank.
        num_blocks: KV blocks; they are filled here, as untouched memory is faster to read.
    """

    def __init__(self, config: EngineConfig, *, num_blocks: int) -> None:
        info = resolve_model(config)
        self._backend: _TimedBackend | None = None
        self._decoder = load_decoder(config, info, stage=0, wrap_backend=self._wrap)
        self._runner = ModelRunner(self._decoder, num_blocks=num_blocks, block_size=config.block_size)
        self.block_size = config.block_size
        self._device = self._decoder.device
        self.decoder_config = info.decoder
        self.max_model_len = info.max_model_len
        self.num_blocks = num_blocks
        self._fill()

    @property
    def device(self) -> str:
        """What it runs on, in words."""
        return torch.cuda.get_device_name(self._device) if self._device.type == "cuda" else "CPU"

    @property
    def dtype(self) -> str:
        """Type of weights and KV."""
        return str(self._decoder.dtype).removeprefix("torch.")

    def measure(self, steps: Sequence[StepInput], *, repeats: int, note: Callable[[str], None]) -> list[StepTimes]:
        """Run all steps several times over, and return the parts of each; see `parts_of`.

        One after the other and all of them again, as what else runs on a machine comes in spells of seconds.

        Args:
            steps: What to run.
            repeats: How often, after a first time that warms up.
            note: Hears of each time.
        """
        for step in steps:
            self._run(step)
        readings: list[list[ClockTimes]] = [[] for _ in steps]
        for number in range(repeats):
            note(f"{len(steps)} steps, time {number + 1} of {repeats}")
            for step, several in zip(steps, readings, strict=True):
                several.append(self._time(step))
        return [parts_of(several) for several in readings]

    def _wrap(self, backend: AttentionBackend) -> AttentionBackend:
        self._backend = _TimedBackend(backend, self._now_s)
        return self._backend

    def _run(self, step: StepInput) -> None:
        hidden = self._runner.forward(step, None)
        self._runner.sample(step, self._runner.logits(step, hidden)).wait()

    def _time(self, step: StepInput) -> ClockTimes:
        assert self._backend is not None, "the decoder has asked for it"
        prepare_s = embed_s = 0.0
        if self._runner.is_joined:  # then they are within `forward`, and take next to nothing there
            # OpenMP's threads, which sampled before, wait actively for a while, on cores that the stage's own need.
            time.sleep(_REST_S)
        else:
            prepare_s, model_input = self._timed(
                lambda: build_model_input(step, block_size=self.block_size, device=self._device)
            )
            with torch.inference_mode():
                embed_s, _ = self._timed(lambda: self._decoder.embed(model_input.token_ids))
        # Waiting for the device around each attention would lengthen the rest, so the whole is timed by itself.
        forward_s, hidden = self._timed(lambda: self._runner.forward(step, None))
        sample_s, _ = self._timed(lambda: self._runner.sample(step, self._runner.logits(step, hidden)).wait())
        self._backend.is_timing = True
        self._backend.seconds = 0.0
        self._runner.forward(step, None)
        self._backend.is_timing = False
        return ClockTimes(
            prepare_s=prepare_s,
            embed_s=embed_s,
            forward_s=forward_s,
            attention_s=self._backend.seconds,
            sample_s=sample_s,
        )

    def _timed(self, run: Callable[[], _T]) -> tuple[float, _T]:
        begin_s = self._now_s()
        result = run()
        return self._now_s() - begin_s, result

    def _now_s(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()

    def _fill(self) -> None:
        size = min(self.max_model_len, _FILL_TOKENS) // self.block_size * self.block_size or self.block_size
        blocks_each = size // self.block_size
        for first in range(0, self.num_blocks, blocks_each):
            count = min(blocks_each, self.num_blocks - first)
            step = make_step(
                num_decodes=0,
                decode_context=0,
                chunks=((count * self.block_size, 0),),
                block_size=self.block_size,
                vocab_size=self.decoder_config.vocab_size,
                first_block=first,
            )
            self._runner.forward(step, None)


class _TimedBackend:
    """A backend that sums up the time of attention while `is_timing`."""

    def __init__(self, backend: AttentionBackend, now_s: Callable[[], float]) -> None:
        self._backend = backend
        self.is_graphable = False
        self._now_s = now_s
        self.is_timing = False
        self.seconds = 0.0

    @property
    def is_in_layers(self) -> bool:
        return self._backend.is_in_layers and not self.is_timing

    def refuse(self, *, block_size: int, head_size: int, dtype: torch.dtype, device: torch.device) -> str | None:
        return self._backend.refuse(block_size=block_size, head_size=head_size, dtype=dtype, device=device)

    def kv_cache_shape(self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int) -> tuple[int, ...]:
        return self._backend.kv_cache_shape(
            num_blocks=num_blocks, block_size=block_size, num_kv_heads=num_kv_heads, head_size=head_size
        )

    def rotate_and_write(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        return self._backend.rotate_and_write(qkv, k_cache, v_cache, cos=cos, sin=sin, metadata=metadata)

    def attention(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        *,
        metadata: AttentionMetadata,
        scale: float,
        sliding_window: int | None,
    ) -> Tensor:
        begin_s = self._now_s() if self.is_timing else 0.0
        out = self._backend.attention(
            q, k_cache, v_cache, metadata=metadata, scale=scale, sliding_window=sliding_window
        )
        if self.is_timing:
            self.seconds += self._now_s() - begin_s
        return out
