"""What the ranks of a pipeline will hold in memory, from a model's shape alone: will a request of `max_model_len` fit?

It follows `kv_cache.fit_num_blocks`, which decides at the start by what is really free.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import activation_bytes, choose_num_blocks
from rayserve_sarathi.models.config import stage_layers
from rayserve_sarathi.models.load import resolve_dtype
from rayserve_sarathi.models.parameters import Parameter, stage_parameters
from rayserve_sarathi.models.resolve import ModelInfo
from rayserve_sarathi.models.shard import shard_of

_GIB = 1024**3
_CUDA_BYTES = _GIB
"""What the driver, cuBLAS and NCCL take of a GPU; an estimate on the safe side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """Where the ranks of a stage are: a node, or GPUs of one, whose memory is each its own.

    Args:
        name: Of the node.
        num_bytes: Of the node, or of one GPU.
    """

    name: str
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class StageEstimate:
    """The largest rank of a stage.

    Args:
        weight_bytes: Of its parameters.
        activation_bytes: Most that a step needs.
        kv_token_bytes: KV of one token, in all its layers.
        num_blocks: KV blocks that it has room for; less than 0 where not even the weights fit.
    """

    weight_bytes: int
    activation_bytes: int
    kv_token_bytes: int
    num_blocks: int


@dataclass(frozen=True, slots=True, kw_only=True)
class MemoryEstimate:
    """A pipeline's memory.

    Args:
        stages: Of each stage.
        num_tokens: Whose KV fits, 0 if none.
        max_model_len: Most tokens of a request.
        num_requests: Requests of `max_model_len` that fit at once.
        problem: Why it cannot work, or None.
    """

    stages: tuple[StageEstimate, ...]
    num_tokens: int
    max_model_len: int
    num_requests: int
    problem: str | None


def estimate_memory(config: EngineConfig, info: ModelInfo, memories: Sequence[Memory]) -> MemoryEstimate:
    """Estimate what a pipeline holds and how many tokens its KV caches have room for.

    Args:
        config: The engine's, with a `device` that is not `auto`.
        info: Of the model.
        memories: Of each stage.

    Raises:
        ConfigError: The model cannot be split over so many stages.
    """
    bare = [_without_kv(config, info, stage) for stage in range(config.pipeline_parallel_size)]
    stages = tuple(
        replace(
            stage,
            num_blocks=choose_num_blocks(
                config,
                info,
                block_bytes=stage.kv_token_bytes * config.block_size,
                free_bytes=_usable_bytes(config, memories[index])
                - _bare_bytes(config, _ranks_beside(config, index, bare, memories)),
            )[0],
        )
        for index, stage in enumerate(bare)
    )
    num_blocks = min(stage.num_blocks for stage in stages)
    needed = -(-info.max_model_len // config.block_size)
    return MemoryEstimate(
        stages=stages,
        num_tokens=max(0, num_blocks) * config.block_size,
        max_model_len=info.max_model_len,
        num_requests=max(0, num_blocks) // needed,
        problem=_find_problem(config, info, stages, memories),
    )


def _without_kv(config: EngineConfig, info: ModelInfo, stage: int) -> StageEstimate:
    # Rank 0 is the largest: it alone has biases that are added once.
    shape, shard = info.decoder, shard_of(info.decoder, tp_size=config.tensor_parallel_size)
    layers = stage_layers(shape.num_hidden_layers, config.pipeline_parallel_size, stage)
    itemsize = resolve_dtype(config, shape, torch.device(config.device)).itemsize
    return StageEstimate(
        weight_bytes=itemsize * sum(map(_num_elements, stage_parameters(shape, layers, shard).values())),
        activation_bytes=activation_bytes(
            config, shape, shard, itemsize=itemsize, is_last=layers.stop == shape.num_hidden_layers
        ),
        kv_token_bytes=2 * len(layers) * len(shard.kv_heads) * shape.head_dim * itemsize,
        num_blocks=0,
    )


def _num_elements(parameter: Parameter) -> int:
    row = math.prod(map(len, parameter.parts[0].box[1:]))
    return row * (sum(len(part.box[0]) for part in parameter.parts) + parameter.num_padding_rows)


def _ranks_beside(
    config: EngineConfig, index: int, stages: Sequence[StageEstimate], memories: Sequence[Memory]
) -> list[StageEstimate]:
    """Return the stage of each rank that shares its memory with a rank of this stage, itself included."""
    if config.device == "cuda" and config.transport != "inline":
        return [stages[index]]
    here = [stage for stage, memory in zip(stages, memories, strict=True) if memory == memories[index]]
    return here * config.tensor_parallel_size


def _bare_bytes(config: EngineConfig, ranks: Sequence[StageEstimate]) -> int:
    """Return what ranks that share a memory need beside KV. Those of inline stages compute one after another."""
    activations = max(rank.activation_bytes for rank in ranks) if config.device == "cuda" else 0
    return sum(rank.weight_bytes for rank in ranks) + activations


def _usable_bytes(config: EngineConfig, memory: Memory) -> int:
    if config.device == "cuda":
        return int(memory.num_bytes * config.gpu_memory_utilization) - _CUDA_BYTES
    return memory.num_bytes


def _find_problem(
    config: EngineConfig, info: ModelInfo, stages: Sequence[StageEstimate], memories: Sequence[Memory]
) -> str | None:
    needed = -(-info.max_model_len // config.block_size)
    num_blocks = min(stage.num_blocks for stage in stages)
    for index, (stage, memory) in enumerate(zip(stages, memories, strict=True)):
        usable, where = _usable_bytes(config, memory), "GPU" if config.device == "cuda" else memory.name
        if config.device == "cpu":
            who, hint = f"{memory.name} with its stages", "use a machine with more memory"
        elif config.transport == "inline":
            who, hint = "the process of all stages", "use another transport, by which each stage has a GPU"
        else:
            who = f"a rank of stage {index}" if config.tensor_parallel_size > 1 else f"stage {index}"
            hint = "use more stages or ranks (pipeline_parallel_size, tensor_parallel_size)"
        ranks = _ranks_beside(config, index, stages, memories)
        held = _bare_bytes(config, ranks)
        if held > usable:
            return (
                f"{who} needs {held / _GIB:.1f} GiB for weights and activations, but its {where} has"
                f" {usable / _GIB:.1f} GiB for the engine; {hint}"
            )
        if stage.num_blocks < needed:
            needed_bytes = needed * config.block_size * stage.kv_token_bytes
            return (
                f"{who} has room for the KV of {max(0, stage.num_blocks) * config.block_size:,} tokens, but"
                f" max_model_len is {info.max_model_len:,}, which takes {needed_bytes / _GIB:.2f} GiB beside"
                f" {held / _GIB:.1f} GiB of weights and activations; lower max_model_len, or {hint}"
            )
        given_bytes = num_blocks * config.block_size * sum(rank.kv_token_bytes for rank in ranks)
        if held + given_bytes > usable:
            return (
                f"{who} is told to keep {given_bytes / _GIB:.1f} GiB of KV cache beside {held / _GIB:.1f} GiB, but its"
                f" {where} has {usable / _GIB:.1f} GiB; lower num_gpu_blocks_override or kv_cache_memory_bytes"
            )
    return None
