"""What is estimated from a model's shape is what its weights and KV caches take."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import fit_num_blocks, kv_block_bytes
from rayserve_sarathi.execution.memory_estimate import Memory, MemoryEstimate, estimate_memory
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.parameters import stage_parameters
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.models.shard import shard_of
from rayserve_sarathi.models.weights import dummy_weights
from tests.checkpoints import FAMILIES, save_checkpoint

GIB = 1024**3


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(folder, "llama")  # 3 layers, 128 positions
    return folder


def estimate(folder: Path, *, memory_bytes: int = GIB, **settings: Any) -> MemoryEstimate:
    config = EngineConfig(model=str(folder), **{"device": "cpu", **settings})
    memories = [Memory(name="node", num_bytes=memory_bytes)] * config.pipeline_parallel_size
    return estimate_memory(config, resolve_model(config), memories)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_weights_of_a_rank_are_counted_exactly(family: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, family)
    config = EngineConfig(model=str(tmp_path), device="cpu")
    shape = resolve_model(config).decoder
    parameters = stage_parameters(shape, range(3), shard_of(shape))
    weights = dummy_weights(parameters, seed=0, dtype=torch.float32, device=torch.device("cpu"))

    (stage,) = estimate(tmp_path).stages
    assert stage.weight_bytes == sum(weight.nbytes for weight in weights.values())


@pytest.mark.parametrize("settings", [{"kv_cache_memory_bytes": 200_000}, {"num_gpu_blocks_override": 9}, {}])
def test_the_kv_cache_is_as_large_as_it_will_be(folder: Path, settings: dict[str, Any]) -> None:
    config = EngineConfig(model=str(folder), device="cpu", load_format="dummy", **settings)
    info = resolve_model(config)
    decoder = load_decoder(config, info, stage=0)
    (stage,) = estimate(folder, memory_bytes=64 * GIB, **settings).stages

    assert stage.kv_token_bytes * config.block_size == kv_block_bytes(decoder, config.block_size)
    assert stage.num_blocks == fit_num_blocks(config, info, decoder)


def test_stages_and_ranks_share_the_weights(folder: Path) -> None:
    whole = estimate(folder).stages[0]
    halves = estimate(folder, pipeline_parallel_size=2).stages
    (rank,) = estimate(folder, tensor_parallel_size=2).stages

    assert sum(half.weight_bytes for half in halves) == whole.weight_bytes
    assert sum(half.kv_token_bytes for half in halves) == whole.kv_token_bytes
    assert rank.kv_token_bytes == whole.kv_token_bytes / 2
    assert whole.weight_bytes / 2 < rank.weight_bytes < whole.weight_bytes * 0.6


def test_requests_of_max_model_len_are_counted(folder: Path) -> None:
    result = estimate(folder, num_gpu_blocks_override=20, max_model_len=40)

    assert (result.num_tokens, result.max_model_len, result.num_requests, result.problem) == (320, 40, 6, None)


def test_a_gpu_keeps_what_its_utilization_leaves(folder: Path) -> None:
    result = estimate(folder, device="cuda", dtype="bfloat16", memory_bytes=4 * GIB)
    stage = result.stages[0]

    room = int(0.9 * 4 * GIB) - GIB - stage.weight_bytes - stage.activation_bytes
    assert stage.num_blocks == room // (16 * stage.kv_token_bytes)
    assert result.problem is None


def test_inline_stages_share_a_gpu(folder: Path) -> None:
    settings: dict[str, Any] = {"device": "cuda", "dtype": "float32", "pipeline_parallel_size": 2}
    weight_bytes = sum(stage.weight_bytes for stage in estimate(folder, **settings).stages)
    activation_bytes = estimate(folder, **settings).stages[-1].activation_bytes
    # Room for one stage's weights and a request, but not for both stages'.
    memory_bytes = int((GIB + activation_bytes + 0.9 * weight_bytes) / 0.9)

    together = estimate(folder, **settings, transport="inline", memory_bytes=memory_bytes)

    assert "the process of all stages needs" in (together.problem or "")
    assert "needs" not in (estimate(folder, **settings, memory_bytes=memory_bytes).problem or "")


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        (
            {"kv_cache_memory_bytes": 10_000, "memory_bytes": GIB},
            "room for the KV of 16 tokens, but max_model_len is 128",
        ),
        ({"device": "cuda", "memory_bytes": GIB}, "stage 0 needs 0.0 GiB for weights and activations, but its GPU has"),
        ({"device": "cuda", "memory_bytes": GIB, "tensor_parallel_size": 2}, "a rank of stage 0 needs"),
        ({"memory_bytes": 10_000}, "node with its stages needs 0.0 GiB for weights and activations, but its node has"),
        ({"num_gpu_blocks_override": 10**7}, "is told to keep 57.2 GiB of KV cache"),
        # Not even the largest stage of the three would fill the node by itself.
        (
            {"kv_cache_memory_bytes": GIB // 2, "pipeline_parallel_size": 3},
            "node with its stages is told to keep 1.5 GiB of KV cache",
        ),
        (
            {"kv_cache_memory_bytes": 3 * GIB // 4, "tensor_parallel_size": 2},
            "node with its stages is told to keep 1.5 GiB of KV cache",
        ),
    ],
)
def test_what_cannot_fit_is_said(folder: Path, settings: dict[str, Any], problem: str) -> None:
    assert problem in (estimate(folder, **settings).problem or "")
