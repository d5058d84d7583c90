"""The machine that figures are about: a model, the hardware it runs on, and how it is split."""

from dataclasses import dataclass
from pathlib import Path

from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.hardware import Hardware, find_hardware
from rayserve_sarathi.simulation.model_shape import RankShape, find_model, num_kv_blocks, rank_shape
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.step_shape import StepShape

_REFERENCE_DECODES = 32
_REFERENCE_CONTEXT = 4096


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """What is predicted or simulated.

    Args:
        model: See `model_shape.find_model`.
        hardware: See `hardware.HARDWARE`.
        tensor_parallel_size: Ranks of a stage.
        pipeline_parallel_size: Stages.
        profiles: Folder of measured profiles; None predicts from the data sheet.
    """

    model: str
    hardware: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    profiles: Path | None = None

    @property
    def source(self) -> str:
        """What step times come from: `profile` or `roofline`."""
        return "roofline" if self.profiles is None else "profile"

    @property
    def title(self) -> str:
        """One line for a reader: model, devices, split and source."""
        split = f"TP{self.tensor_parallel_size}"
        if self.pipeline_parallel_size > 1:
            split += f"-PP{self.pipeline_parallel_size}"
        num_devices = self.tensor_parallel_size * self.pipeline_parallel_size
        source = "data sheet (roofline)" if self.profiles is None else "measured profiles"
        return f"{self.model} on {num_devices} x {self.hardware}, {split}, {source}"

    def device(self) -> Hardware:
        """Return the data sheet.

        Raises:
            ConfigError: There is no such hardware.
        """
        return find_hardware(self.hardware)

    def step_times(self) -> CostModel:
        """Return what predicts steps.

        Raises:
            ConfigError: Model or hardware is unknown, they do not fit each other, or nobody measured them.
        """
        return make_step_time_model(
            self.model,
            self.hardware,
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            source="roofline" if self.profiles is None else "profile",
            profiles=self.profiles,
        )

    def rank(self) -> RankShape:
        """Return what a rank has of the model.

        Raises:
            ConfigError: The model is unknown or cannot be split so.
        """
        return rank_shape(
            find_model(self.model),
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
        )

    def num_kv_blocks(self, block_size: int) -> int:
        """Return the KV blocks that there is room for.

        Raises:
            ConfigError: There is none, or as for `rank`.
        """
        return num_kv_blocks(
            find_model(self.model),
            self.device(),
            tensor_parallel_size=self.tensor_parallel_size,
            pipeline_parallel_size=self.pipeline_parallel_size,
            block_size=block_size,
        )


def decode_step(num_decodes: int, context_len: int) -> StepShape:
    """Return a step of decodes that have `context_len` tokens each."""
    return StepShape(
        num_decodes=num_decodes,
        decode_context_tokens=num_decodes * context_len,
        chunks=(),
        num_samples=num_decodes,
    )


def prompt_step(num_prompts: int, prompt_len: int) -> StepShape:
    """Return a step of whole prompts of `prompt_len` tokens each."""
    return StepShape(
        num_decodes=0, decode_context_tokens=0, chunks=((prompt_len, 0),) * num_prompts, num_samples=num_prompts
    )


def interval_s(model: CostModel, shape: StepShape) -> float:
    """Return the time from one step to the next where all are of this shape: of the slowest part of a full pipeline.

    With one stage there is one step in flight, so that the CPU time is not hidden behind another step.
    """
    if model.num_stages == 1:
        return model.latency_s(shape)
    return max(model.cpu_s(shape), *model.stage_times_s(shape))


def reference_decode_s(model: CostModel) -> float:
    """Return the time of 32 decodes with 4,096 tokens of context each, the unit of the paper's targets (section 5)."""
    return model.latency_s(decode_step(_REFERENCE_DECODES, _REFERENCE_CONTEXT))
