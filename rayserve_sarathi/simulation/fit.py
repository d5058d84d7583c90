"""Which ways to split a model there are on named hardware, and whether a split fits into its memory."""

from dataclasses import dataclass

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.simulation.hardware import Hardware
from rayserve_sarathi.simulation.model_shape import num_kv_blocks, rank_shape, usable_bytes


@dataclass(frozen=True, slots=True, kw_only=True)
class Parallelism:
    """How a pipeline splits a model.

    Args:
        tensor_parallel_size: Ranks of a stage.
        pipeline_parallel_size: Stages.
    """

    tensor_parallel_size: int
    pipeline_parallel_size: int

    @property
    def num_gpus(self) -> int:
        """Devices of a pipeline."""
        return self.tensor_parallel_size * self.pipeline_parallel_size


@dataclass(frozen=True, slots=True, kw_only=True)
class Fit:
    """What a rank holds of a model that fits.

    Args:
        weight_bytes: On the fullest rank.
        num_blocks: KV blocks that there is room for.
    """

    weight_bytes: int
    num_blocks: int


def parallelisms(hardware: Hardware, *, max_stages: int) -> list[Parallelism]:
    """Return the splits worth a look, those with the fewest devices first, and with the fewest stages among them.

    The ranks of a stage share a node, so `tensor_parallel_size` is a power of two up to its devices.
    """
    sizes = [2**power for power in range(hardware.devices_per_node.bit_length())]
    splits = [
        Parallelism(tensor_parallel_size=size, pipeline_parallel_size=num_stages)
        for size in sizes
        for num_stages in range(1, max_stages + 1)
    ]
    return sorted(splits, key=lambda split: (split.num_gpus, split.pipeline_parallel_size))


def check_fit(
    decoder: DecoderConfig,
    hardware: Hardware,
    parallelism: Parallelism,
    *,
    max_model_len: int,
    block_size: int = DEFAULT_BLOCK_SIZE,
    gpu_memory_utilization: float = 0.9,
) -> Fit:
    """Return what each rank holds.

    Args:
        decoder: The model.
        hardware: Of all ranks.
        parallelism: Their number.
        max_model_len: Tokens of a request that the KV cache must have room for.
        block_size: Tokens in a KV block.
        gpu_memory_utilization: Share of the memory that may be taken.

    Raises:
        ConfigError: The model cannot be split so, or a rank has no room for its weights or for one request's KV.
    """
    num_ranks, num_stages = parallelism.tensor_parallel_size, parallelism.pipeline_parallel_size
    shape = rank_shape(decoder, tensor_parallel_size=num_ranks, pipeline_parallel_size=num_stages)
    weight_bytes = max(map(shape.stage_parameters, range(num_stages))) * hardware.itemsize
    usable = usable_bytes(hardware, gpu_memory_utilization)
    if weight_bytes >= usable:
        raise ConfigError(f"does not fit: weights {weight_bytes / 1e9:.0f} GB of {usable / 1e9:.0f} GB")
    num_blocks = num_kv_blocks(
        decoder,
        hardware,
        tensor_parallel_size=num_ranks,
        pipeline_parallel_size=num_stages,
        block_size=block_size,
        gpu_memory_utilization=gpu_memory_utilization,
    )
    if num_blocks * block_size < max_model_len:
        raise ConfigError(
            f"does not fit: beside weights of {weight_bytes / 1e9:.0f} GB of {usable / 1e9:.0f} GB there is room for"
            f" the KV of {num_blocks * block_size:,} tokens, a request may have {max_model_len:,}"
        )
    return Fit(weight_bytes=weight_bytes, num_blocks=num_blocks)
