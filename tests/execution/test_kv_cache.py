from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from rayserve_sarathi.config import EngineConfig, SchedulerConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.execution.kv_cache import (
    activation_bytes,
    allocate_kv_caches,
    fit_num_blocks,
    free_memory_bytes,
    kv_block_bytes,
)
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.models.shard import shard_of
from tests.checkpoints import save_checkpoint

# Key and value, 3 layers, 2 heads of 8 numbers, 16 tokens, 4 bytes.
BLOCK_BYTES = 2 * 3 * 2 * 8 * 16 * 4


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(folder, "llama")  # 128 positions: 8 blocks
    return folder


def fit(folder: Path, **settings: Any) -> int:
    config = EngineConfig(model=str(folder), device="cpu", load_format="dummy", **settings)
    info = resolve_model(config)
    return fit_num_blocks(config, info, load_decoder(config, info, stage=0))


def test_the_number_of_blocks_can_be_given(folder: Path) -> None:
    assert fit(folder, num_gpu_blocks_override=9) == 9


def test_memory_that_is_given_is_filled_with_whole_blocks(folder: Path) -> None:
    assert fit(folder, kv_cache_memory_bytes=9 * BLOCK_BYTES + 100) == 9


def test_a_narrow_dtype_fits_twice_as_many(folder: Path) -> None:
    assert fit(folder, kv_cache_memory_bytes=9 * BLOCK_BYTES, dtype="bfloat16") == 18


def test_a_stage_holds_the_kv_of_its_own_layers_only(folder: Path) -> None:
    # The first of two stages has two of the three layers.
    assert fit(folder, kv_cache_memory_bytes=12 * BLOCK_BYTES, pipeline_parallel_size=2) == 18


def test_on_a_cpu_the_default_is_what_all_requests_can_need(folder: Path) -> None:
    assert fit(folder, scheduler=SchedulerConfig(max_num_seqs=3)) == 3 * 8
    assert fit(folder, scheduler=SchedulerConfig(max_num_seqs=3), max_model_len=33) == 3 * 3


def test_on_a_cpu_the_default_stays_within_a_quarter_of_the_free_memory(folder: Path) -> None:
    num_blocks = fit(folder, scheduler=SchedulerConfig(max_num_seqs=10**9))

    assert num_blocks * BLOCK_BYTES <= 0.3 * free_memory_bytes()


@pytest.mark.parametrize("setting", ["num_gpu_blocks_override", "kv_cache_memory_bytes"])
def test_a_pool_too_small_for_the_longest_request_is_refused_with_the_numbers(folder: Path, setting: str) -> None:
    value = 7 if setting == "num_gpu_blocks_override" else 7 * BLOCK_BYTES

    with pytest.raises(
        ConfigError, match=rf"112 tokens.*max_model_len is 128; lower max_model_len, or raise {setting}"
    ):
        fit(folder, **{setting: value})
    assert fit(folder, **{setting: value}, max_model_len=112) == 7


@pytest.mark.parametrize("setting", ["num_gpu_blocks_override", "kv_cache_memory_bytes"])
def test_a_pool_larger_than_the_memory_is_refused_with_the_numbers(folder: Path, setting: str) -> None:
    with pytest.raises(ConfigError, match=rf"{setting} asks for \d+ MiB .* but \d+ MiB of memory are free; lower it"):
        fit(folder, **{setting: 10**13})


def test_what_the_stages_of_a_process_take_together_is_compared_with_its_memory(folder: Path) -> None:
    settings: dict[str, Any] = {"pipeline_parallel_size": 3, "kv_cache_memory_bytes": free_memory_bytes() // 2}

    assert fit(folder, **settings, transport="socket") > 8
    with pytest.raises(ConfigError, match="of KV cache over the ranks of this machine"):
        fit(folder, **settings, transport="inline")


def test_activations_count_the_copies_for_experts(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "mixtral")
    config = EngineConfig(model=str(tmp_path), device="cpu")
    shape = resolve_model(config).decoder

    def count(num_experts_per_tok: int) -> int:
        chosen = replace(shape, num_experts_per_tok=num_experts_per_tok)
        return activation_bytes(config, chosen, shard_of(chosen), itemsize=2, is_last=False)

    # 512 tokens of 32 numbers: in, out and in order with 2 bytes each, weighted with 4.
    assert count(3) - count(2) == 512 * 32 * (3 * 2 + 4)


def test_pools_are_allocated_for_each_layer(folder: Path) -> None:
    config = EngineConfig(model=str(folder), device="cpu", load_format="dummy")
    decoder = load_decoder(config, resolve_model(config), stage=0)

    caches = allocate_kv_caches(decoder, num_blocks=5, block_size=16)

    assert len(caches) == 3
    assert sum(pool.nbytes for caches_of_layer in caches for pool in caches_of_layer) == 5 * BLOCK_BYTES
    assert kv_block_bytes(decoder, 16) == BLOCK_BYTES
