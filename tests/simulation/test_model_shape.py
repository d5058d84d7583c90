"""Sizes of published models, what a rank has of them, and the KV cache that fits beside it."""

import json
from pathlib import Path

import pytest

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.hardware import HARDWARE, find_hardware
from rayserve_sarathi.simulation.model_shape import MODEL_NAMES, find_model, num_kv_blocks, rank_shape
from tests.published_models import save_config

# Parameters, in billions, as their authors give them.
PUBLISHED = {
    "mistral-7b": 7.24,
    "llama3-8b": 8.03,
    "yi-34b": 34.4,
    "codellama-34b": 33.7,
    "llama2-70b": 69.0,
    "falcon-180b": 179.5,
}


def test_every_name_is_checked_below():
    assert set(PUBLISHED) == set(MODEL_NAMES)


@pytest.mark.parametrize(("name", "billions"), PUBLISHED.items())
def test_parameters_are_those_that_were_published(name: str, billions: float):
    shape = rank_shape(find_model(name))

    assert shape.stage_parameters(0) / 1e9 == pytest.approx(billions, rel=0.01)


@pytest.mark.parametrize(
    ("name", "hub_id"),
    [
        ("mistral-7b", "mistralai/Mistral-7B-v0.1"),
        ("yi-34b", "01-ai/Yi-34B"),
        ("llama2-70b", "meta-llama/Llama-2-70b-hf"),
        ("falcon-180b", "tiiuae/falcon-180B"),
    ],
)
def test_a_name_is_as_the_config_of_its_checkpoint(tmp_path: Path, name: str, hub_id: str):
    save_config(tmp_path, hub_id)

    assert rank_shape(find_model(name)) == rank_shape(find_model(str(tmp_path)))


def test_an_unknown_model_is_refused_with_those_that_are_known():
    with pytest.raises(ConfigError, match=r"or use one of \['codellama-34b', .*'yi-34b'\]"):
        find_model("no such model")


def test_ranks_and_stages_have_all_of_the_model_between_them():
    model = find_model("llama2-70b")
    whole = rank_shape(model)
    parts = rank_shape(model, tensor_parallel_size=4, pipeline_parallel_size=3)

    assert parts.layers_per_stage == (27, 27, 26)
    assert 4 * sum(map(parts.stage_parameters, range(3))) == whole.stage_parameters(0)
    assert 4 * parts.layer_flops == whole.layer_flops
    assert whole.layer_flops == 2 * whole.layer_parameters


def test_more_ranks_than_kv_heads_have_copies_of_them():
    assert rank_shape(find_model("mistral-7b"), tensor_parallel_size=16).kv_size == 128


def test_experts_are_all_kept_and_few_computed(tmp_path: Path):
    mixtral = {
        "architectures": ["MixtralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "num_local_experts": 8,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 32768,
    }
    (tmp_path / "config.json").write_text(json.dumps(mixtral))
    shape = rank_shape(find_model(str(tmp_path)))

    assert shape.stage_parameters(0) / 1e9 == pytest.approx(46.7, rel=0.01)
    assert 32 * shape.layer_flops / 2e9 == pytest.approx(12.6, rel=0.02)


def test_the_kv_cache_has_what_weights_leave():
    # 0.9 * 80 GB, less 14.48 GB of weights and 1 GB, over 128 KiB for each token.
    assert num_kv_blocks(find_model("mistral-7b"), find_hardware("a100")) == (72 - 1 - 14.483) * 10**9 // (16 * 2**17)


def test_stages_leave_more_room_for_the_kv_cache():
    model, a100 = find_model("yi-34b"), find_hardware("a100")
    one = num_kv_blocks(model, a100, tensor_parallel_size=2)
    two = num_kv_blocks(model, a100, tensor_parallel_size=2, pipeline_parallel_size=2)

    assert two > 2 * one
    assert num_kv_blocks(model, a100, tensor_parallel_size=2, block_size=32) == one // 2
    assert num_kv_blocks(model, a100, tensor_parallel_size=2, gpu_memory_utilization=0.8) < one


def test_a_model_that_does_not_fit_is_refused():
    with pytest.raises(ConfigError, match=r"stage 0 has .* GB of weights, but a40 leaves 42.2 GB"):
        num_kv_blocks(find_model("llama2-70b"), find_hardware("a40"), tensor_parallel_size=2)


def test_unknown_hardware_is_refused_with_what_is_known():
    with pytest.raises(ConfigError, match=r"unknown hardware 'tpu'; use one of \['a100', "):
        find_hardware("tpu")


def test_hardware_has_the_name_it_is_found_by():
    assert all(find_hardware(name).name == name for name in HARDWARE)
