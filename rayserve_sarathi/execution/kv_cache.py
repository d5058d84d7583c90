"""How many KV blocks a stage has room for, and their allocation."""

import logging
import math
from pathlib import Path

import torch
from torch import Tensor

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.resolve import ModelInfo

_MIB = 1024 * 1024

_logger = logging.getLogger(__name__)


def fit_num_blocks(config: EngineConfig, info: ModelInfo, decoder: Decoder) -> int:
    """Return how many KV blocks this stage has room for; a pipeline uses the least over its stages.

    Call it once the weights are on the device, as what they leave is what counts.

    Raises:
        ConfigError: A request of `max_model_len` tokens would not fit.
    """
    block_bytes = kv_block_bytes(decoder, config.block_size)
    if config.num_gpu_blocks_override is not None:
        num_blocks, setting = config.num_gpu_blocks_override, "num_gpu_blocks_override"
    elif config.kv_cache_memory_bytes is not None:
        num_blocks, setting = config.kv_cache_memory_bytes // block_bytes, "kv_cache_memory_bytes"
    elif decoder.device.type == "cuda":
        # Inline stages share the GPU.
        num_stages = config.pipeline_parallel_size if config.transport == "inline" else 1
        num_blocks, setting = _free_gpu_bytes(config, decoder) // num_stages // block_bytes, "gpu_memory_utilization"
    else:
        wanted = config.scheduler.max_num_seqs * -(-info.max_model_len // config.block_size)
        # Stages of a CPU deployment mostly share a machine, so its quarter is for all of them.
        room = free_memory_bytes() // (4 * config.pipeline_parallel_size) // block_bytes
        num_blocks, setting = min(wanted, room), "kv_cache_memory_bytes"

    needed = -(-info.max_model_len // config.block_size)
    if num_blocks < needed:
        enough = f"{needed}" if setting == "num_gpu_blocks_override" else f"{needed * block_bytes} bytes"
        raise ConfigError(
            f"the KV cache has room for {max(0, num_blocks) * config.block_size} tokens ({max(0, num_blocks)} blocks,"
            f" {max(0, num_blocks) * block_bytes / _MIB:.1f} MiB), but max_model_len is {info.max_model_len};"
            f" lower max_model_len, or raise {setting} until {enough} are there"
        )
    wanted_bytes = num_blocks * block_bytes
    if decoder.device.type == "cpu" and wanted_bytes > (free := free_memory_bytes()):
        raise ConfigError(
            f"{setting} asks for {wanted_bytes / _MIB:.0f} MiB of KV cache ({num_blocks} blocks of"
            f" {block_bytes / _MIB:.3f} MiB), but {free / _MIB:.0f} MiB of memory are free; lower it"
        )
    return num_blocks


def kv_block_bytes(decoder: Decoder, block_size: int) -> int:
    """Return the bytes of a block over all layers of the stage."""
    elements = math.prod(_pool_shape(decoder, 1, block_size))
    return 2 * len(decoder.layers) * elements * decoder.dtype.itemsize


def allocate_kv_caches(decoder: Decoder, *, num_blocks: int, block_size: int) -> list[tuple[Tensor, Tensor]]:
    """Return a key and a value pool for each layer of the stage, in the backend's layout.

    Their content is undefined: `write_kv` clears a block before its first use. On a CPU untouched memory costs nothing,
    where writing zeros to it took seconds of the start.
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
        num_kv_heads=decoder.config.num_key_value_heads,
        head_size=decoder.config.head_dim,
    )


def _free_gpu_bytes(config: EngineConfig, decoder: Decoder) -> int:
    free, total = torch.cuda.mem_get_info(decoder.device)
    return int(total * config.gpu_memory_utilization) - (total - free) - _activation_bytes(config, decoder)


def _activation_bytes(config: EngineConfig, decoder: Decoder) -> int:
    """Estimate the most that a step needs beside weights and KV: one layer's tensors, and the sampler's."""
    shape = decoder.config
    num_tokens = max(config.scheduler.token_budget, config.scheduler.max_num_seqs)
    heads = shape.num_attention_heads + shape.num_key_value_heads
    layer = 4 * shape.hidden_size + 4 * heads * shape.head_dim + 4 * shape.intermediate_size
    # Logits, weights, kept weights and their float64 sums at once.
    sampler = 6 * config.scheduler.max_num_seqs * shape.vocab_size * 4 if decoder.is_last else 0
    return num_tokens * layer * decoder.dtype.itemsize + sampler
