"""Ranks cover each tensor of a checkpoint, and what cannot be split is refused."""

from dataclasses import replace
from math import prod
from pathlib import Path

import pytest
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.parameters import stage_parameters
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.models.shard import shard_of
from tests.checkpoints import FAMILIES, save_checkpoint


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DecoderConfig:
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(folder, "llama")  # 4 heads, 2 KV heads, intermediate size 48
    return resolve_model(EngineConfig(model=str(folder))).decoder


@pytest.mark.parametrize("family", FAMILIES)
def test_each_number_is_on_one_rank_or_on_all(family: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, family)
    config = resolve_model(EngineConfig(model=str(tmp_path))).decoder
    layers = range(config.num_hidden_layers)
    ranks = [stage_parameters(config, layers, shard_of(config, tp_rank=rank, tp_size=2)) for rank in range(2)]
    parts = [[part for parameter in rank.values() for part in parameter.parts] for rank in ranks]
    counts = {part.name: torch.zeros(part.shape, dtype=torch.int64) for part in parts[0] + parts[1]}

    for part in parts[0] + parts[1]:
        counts[part.name][tuple(slice(side.start, side.stop) for side in part.box)] += 1

    assert all(set(count.unique().tolist()) <= {1, 2} for count in counts.values())
    for rank in parts:
        assert sum(prod(map(len, part.box)) for part in rank) < 0.6 * sum(count.numel() for count in counts.values())


def test_kv_heads_are_split_while_there_are_enough_and_repeated_then(llama: DecoderConfig) -> None:
    config = replace(llama, num_attention_heads=8)

    def kv_heads(tp_size: int) -> list[list[int]]:
        return [list(shard_of(config, tp_rank=rank, tp_size=tp_size).kv_heads) for rank in range(tp_size)]

    assert kv_heads(1) == [[0, 1]]
    assert kv_heads(2) == [[0], [1]]
    assert kv_heads(8) == [[0]] * 4 + [[1]] * 4


@pytest.mark.parametrize(
    ("heads", "kv_heads", "intermediate", "tp_size", "message"),
    [
        (4, 2, 48, 3, r"4 attention heads cannot be split over tensor_parallel_size=3; use one of \[1, 2, 4\]"),
        (4, 2, 48, 8, r"4 attention heads cannot be split over tensor_parallel_size=8; use one of \[1, 2, 4\]"),
        (12, 6, 48, 4, r"12 attention heads cannot be split .*; use one of \[1, 2, 3, 6, 12\]"),
        (71, 1, 71 * 256, 2, r"71 attention heads cannot be split .*; use one of \[1, 71\]"),
        (4, 2, 46, 4, r"an intermediate_size of 46 cannot be split over tensor_parallel_size=4; use one of \[1, 2\]"),
    ],
)
def test_what_cannot_be_split_is_refused_with_what_can(
    llama: DecoderConfig, heads: int, kv_heads: int, intermediate: int, tp_size: int, message: str
) -> None:
    config = replace(llama, num_attention_heads=heads, num_key_value_heads=kv_heads, intermediate_size=intermediate)

    with pytest.raises(ConfigError, match=message):
        shard_of(config, tp_size=tp_size)


def test_a_split_that_cannot_be_is_refused_before_any_weight_is_read(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match="cannot be split over tensor_parallel_size=3"):
        resolve_model(EngineConfig(model=str(tmp_path), tensor_parallel_size=3))
