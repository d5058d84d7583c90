"""What is to be simulated. Apart from what simulates it, as commands read options without loading models."""

from dataclasses import dataclass, field
from pathlib import Path

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE, SchedulerConfig, SloConfig
from rayserve_sarathi.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class SystemConfig:
    """What is simulated.

    Args:
        model: See `model_shape.find_model`.
        hardware: See `hardware.HARDWARE`.
        tensor_parallel_size: Ranks of a stage.
        pipeline_parallel_size: Stages.
        profiles: Folder of measured step times; None takes data sheets. See `step_times.make_step_time_model`.
        max_model_len: Most tokens of a request.
        block_size: Tokens in a KV block.
        num_blocks: KV blocks; None takes what fits into the hardware's memory.
        gpu_memory_utilization: Share of the memory that may be taken then.
        scheduler: Policy and limits.
        slo: The target that `token_budget: auto` keeps.

    Raises:
        ConfigError: A number is out of range.
    """

    model: str
    hardware: str
    tensor_parallel_size: int = 1
    pipeline_parallel_size: int = 1
    profiles: Path | None = None
    max_model_len: int = 8192
    block_size: int = DEFAULT_BLOCK_SIZE
    num_blocks: int | None = None
    gpu_memory_utilization: float = 0.9
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: SloConfig = field(default_factory=SloConfig)

    def __post_init__(self) -> None:
        for name in ("tensor_parallel_size", "pipeline_parallel_size", "max_model_len", "block_size"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} must be at least 1, got {getattr(self, name)}")
