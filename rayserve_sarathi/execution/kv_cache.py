"""How many KV blocks a stage, or a rank of it, has room for, and their allocation."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.resolve import ModelInfo
from rayserve_sarathi.models.shard import Shard

_MIB = 1024 * 1024

_logger = logging.getLogger(__name__)


def fit_num_blocks(config: EngineConfig, info: ModelInfo, decoder: Decoder) -> int:
    """Return how many KV blocks this rank of a stage has room for; a pipeline uses the least over all of them.

    Call it once the weights are on the device, as what they leave is what counts.

    Args:
        config: The engine's, with a `device` that is not `auto`.
        info: Of the model.
        decoder: The rank's.

    Raises:
        ConfigError: A request of `max_model_len` tokens would not fit.
    """
    block_bytes = kv_block_bytes(decoder, config.block_size)
    free_bytes = _free_gpu_bytes(config, decoder) if config.device == "cuda" else free_memory_bytes()
    num_blocks, setting = choose_num_blocks(config, info, block_bytes=block_bytes, free_bytes=free_bytes)
    needed = -(-info.max_model_len // config.block_size)
    if num_blocks < needed:
        enough = f"{needed}" if setting == "num_gpu_blocks_override" else f"{needed * block_bytes} bytes"
        raise ConfigError(
            f"the KV cache has room for {max(0, num_blocks) * config.block_size} tokens ({max(0, num_blocks)} blocks,"
            f" {max(0, num_blocks) * block_bytes / _MIB:.1f} MiB), but max_model_len is {info.max_model_len};"
            f" lower max_model_len, or raise {setting} until {enough} are there"
        )
    # The ranks of a stage share a machine, and inline all stages do.
    num_layers = info.decoder.num_hidden_layers if config.transport == "inline" else len(decoder.layers)
    bytes_here = num_blocks * block_bytes // len(decoder.layers) * num_layers * config.tensor_parallel_size
    if config.device == "cpu" and bytes_here > free_bytes:
        raise ConfigError(
            f"{setting} asks for {bytes_here / _MIB:.0f} MiB of KV cache over the ranks of this machine ({num_blocks}"
            f" blocks of {block_bytes / _MIB:.3f} MiB in this one), but {free_bytes / _MIB:.0f} MiB of memory are free;"
            " lower it"
        )
    return num_blocks


def choose_num_blocks(config: EngineConfig, info: ModelInfo, *, block_bytes: int, free_bytes: int) -> tuple[int, str]:
    """Return how many KV blocks a rank gets, and the setting that limits them.

    Args:
        config: The engine's, with a `device` that is not `auto`.
        info: Of the model.
        block_bytes: Of a block, in all layers of the rank's stage.
        free_bytes: What weights and activations leave of the rank's GPU or machine; less than 0 if not even they fit.
    """
    if config.num_gpu_blocks_override is not None:
        return config.num_gpu_blocks_override, "num_gpu_blocks_override"
    if config.kv_cache_memory_bytes is not None:
        return config.kv_cache_memory_bytes // block_bytes, "kv_cache_memory_bytes"
    if config.device == "cuda":
        # Inline stages share the GPU.
        num_stages = config.pipeline_parallel_size if config.transport == "inline" else 1
        return free_bytes // num_stages // block_bytes, "gpu_memory_utilization"
    wanted = config.scheduler.max_num_seqs * -(-info.max_model_len // config.block_size)
    # Stages of a CPU deployment mostly share a machine, so its quarter is for all of them.
    num_ranks = config.pipeline_parallel_size * config.tensor_parallel_size
    return min(wanted, free_bytes // (4 * num_ranks) // block_bytes), "kv_cache_memory_bytes"


def kv_block_bytes(decoder: Decoder, block_size: int) -> int:
    """Return the bytes of a block over all layers of the stage."""
    elements = math.prod(_pool_shape(decoder, 1, block_size))
    return 2 * len(decoder.layers) * elements * decoder.dtype.itemsize


def allocate_kv_caches(decoder: Decoder, *, num_blocks: int, block_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return a key and a value pool for each layer of the stage, in the backend's layout.

    Their content is undefined: a backend clears a block before its first use, or never reads past a request's end. On a
    CPU untouched memory costs nothing, where writing zeros to it took seconds of the start.
    """
    shape = _pool_shape(decoder, num_blocks, block_size)
    _logger.info(
        "KV cache: %d blocks, %d tokens, %.1f MiB for layers %d to %d",
        num_blocks,
        num_blocks * block_size,
        num_blocks * kv_block_bytes(decoder, block_size) / _MIB,
        decoder.layers.start,
        decoder.layers.stop - 1,
    )

    def pool() -> Tensor:
        return torch.empty(shape, dtype=decoder.dtype, device=decoder.device)

    return [(pool(), pool()) for _ in decoder.layers]


def free_memory_bytes() -> int:
    """Return the memory that this process may still take: the machine's, or its container's where that is less."""
    lines = Path("/proc/meminfo").read_text().splitlines()
    free = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:")) * 1024
    cgroup = Path("/sys/fs/cgroup")
    limit = cgroup / "memory.max"
    if limit.is_file() and (text := limit.read_text().strip()) != "max":
        used = int((cgroup / "memory.current").read_text())
        stat = (cgroup / "memory.stat").read_text().splitlines()
        # Files that were read and not used since, such as weights, count as used but make way.
        used -= next((int(line.split()[1]) for line in stat if line.startswith("inactive_file ")), 0)
        free = min(free, int(text) - used)
    return max(0, free)


def _pool_shape(decoder: Decoder, num_blocks: int, block_size: int) -> tuple[int, ...]:
    return decoder.backend.kv_cache_shape(
        num_blocks=num_blocks,
        block_size=block_size,
        num_kv_heads=len(decoder.shard.kv_heads),
        head_size=decoder.config.head_dim,
    )


def activation_bytes(config: EngineConfig, shape: DecoderConfig, shard: Shard, *, itemsize: int, is_last: bool) -> int:
    """Estimate the most that a step needs beside weights and KV: one layer's tensors, and the sampler's."""
    num_tokens = config.scheduler.max_step_tokens
    heads = len(shard.heads) + len(shard.kv_heads)
    layer = 4 * shape.hidden_size + 4 * heads * shape.head_dim + 4 * len(shard.intermediate)
    # Logits, weights, kept weights and their float64 sums at once.
    sampler = 6 * config.scheduler.max_num_seqs * shape.vocab_size * 4 if is_last else 0
    # What goes into the chosen experts and what comes out, by expert, by token, and in float32 times its weight.
    experts = shape.num_experts_per_tok * shape.hidden_size * (3 * itemsize + 4) if shape.mlp == "experts" else 0
    return num_tokens * (layer * itemsize + experts) + sampler


def _free_gpu_bytes(config: EngineConfig, decoder: Decoder) -> int:
    free, total = torch.cuda.mem_get_info(decoder.device)
    activations = activation_bytes(
        config, decoder.config, decoder.shard, itemsize=decoder.dtype.itemsize, is_last=decoder.is_last
    )
    return int(total * config.gpu_memory_utilization) - (total - free) - activations
