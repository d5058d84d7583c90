from typing import Any

import pytest
from transformers import LlamaConfig, MistralConfig, MixtralConfig, PreTrainedConfig, Qwen2Config, Qwen3Config

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.config import DecoderConfig, Llama3Scaling, YarnScaling, stage_layers
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.resolve import parse_architecture

LLAMA = {
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "max_position_embeddings": 128,
}
LLAMA3 = {
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def parse(**keys: Any) -> DecoderConfig:
    """Parse Llama's keys with changes; None removes a key, "null" stands for a null."""
    values = {**LLAMA, **keys}
    kept = {key: None if value == "null" else value for key, value in values.items() if value is not None}
    return parse_architecture(HfConfig(kept, source="config.json"))[1]


def test_defaults_are_those_of_transformers() -> None:
    config = parse(num_key_value_heads=None)

    assert (config.num_key_value_heads, config.head_dim, config.norm_eps) == (4, 8, 1e-6)
    assert (config.rotary.theta, config.rotary.scaling) == (10000.0, None)
    assert (config.dtype, config.tie_word_embeddings, config.max_model_len) == ("float32", False, 128)


@pytest.mark.parametrize("config", [LlamaConfig, MistralConfig, MixtralConfig, Qwen2Config, Qwen3Config])
def test_keys_that_are_missing_or_null_are_as_transformers_has_them(config: type[PreTrainedConfig]) -> None:
    name = config.__name__.removesuffix("Config") + "ForCausalLM"
    keys = {"architectures": [name], "hidden_size": 256, "num_attention_heads": 64}
    theirs = config(**{key: value for key, value in {**LLAMA, **keys}.items() if key != "num_key_value_heads"})

    ours = parse(**keys, num_key_value_heads=None)

    assert ours.num_key_value_heads == theirs.num_key_value_heads
    assert ours.norm_eps == theirs.rms_norm_eps
    assert ours.tie_word_embeddings == theirs.tie_word_embeddings
    assert ours.rotary.theta == theirs.rope_parameters["rope_theta"]
    assert parse(**keys, num_key_value_heads="null").num_key_value_heads == 64


@pytest.mark.parametrize("key", ["dtype", "torch_dtype"])
def test_both_spellings_of_the_dtype(key: str) -> None:
    assert parse(**{key: "bfloat16"}).dtype == "bfloat16"


@pytest.mark.parametrize(
    "keys",
    [
        {"rope_parameters": {"rope_type": "llama3", "rope_theta": 5e5, **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"rope_type": "llama3", **LLAMA3}},
        {"rope_theta": 5e5, "rope_scaling": {"type": "llama3", **LLAMA3}},
    ],
)
def test_all_spellings_of_the_rotary_embedding(keys: dict[str, Any]) -> None:
    rotary = parse(**keys).rotary

    assert rotary.theta == 5e5
    assert rotary.scaling == Llama3Scaling(factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_len=64)


def test_a_null_is_a_missing_key() -> None:
    assert parse(rope_scaling="null", head_dim="null").head_dim == 8


def test_scalings_lengthen_the_context() -> None:
    assert parse(rope_scaling={"type": "linear", "factor": 4.0}).max_model_len == 512
    yarn = parse(rope_scaling={"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128})
    assert yarn.max_model_len == 512
    assert isinstance(yarn.rotary.scaling, YarnScaling)
    assert parse(rope_scaling={"type": "llama3", **LLAMA3}).max_model_len == 128


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope_type 'dynamic' is not supported; use one of"),
        ({"rope_scaling": {"type": "longrope"}}, "rope_type 'longrope' is not supported"),
        ({"rope_scaling": {"type": "linear"}}, "rope_scaling: factor is missing"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor other than 1"),
        ({"hidden_size": None}, "config.json: hidden_size is missing"),
        ({"hidden_size": "32"}, "hidden_size must be a whole number of at least 1, got '32'"),
        ({"num_attention_heads": 0}, "num_attention_heads must be a whole number of at least 1, got 0"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"num_key_value_heads": 3}, "must be a multiple of num_key_value_heads=3"),
        ({"head_dim": 7}, "head_dim must be even"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' is not supported"),
        ({"dtype": "float8_e4m3fn"}, "dtype 'float8_e4m3fn' is not supported"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints are not supported"),
        ({"architectures": ["GPT2LMHeadModel"]}, r"no architecture in \['GPT2LMHeadModel'\] is supported; use one of"),
        ({"architectures": None}, "no architecture in"),
        ({"rms_norm_eps": 0}, "rms_norm_eps must be a number greater than 0"),
        ({"tie_word_embeddings": "yes"}, "tie_word_embeddings must be true or false"),
    ],
)
def test_what_cannot_be_run_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(**keys)


def test_mistral_without_the_key_has_a_window_and_with_null_has_none() -> None:
    mistral = {"architectures": ["MistralForCausalLM"]}

    assert parse(**mistral).sliding_windows == (4096,) * 4
    assert parse(**mistral, sliding_window=7).sliding_windows == (7,) * 4
    assert parse(**mistral, sliding_window="null").sliding_windows == (None,) * 4


def test_mistral_has_windows_in_the_layers_that_its_config_names() -> None:
    mistral = {"architectures": ["MistralForCausalLM"], "sliding_window": 8}
    types = ["full_attention", "sliding_attention", "full_attention", "sliding_attention"]

    assert parse(**mistral, layer_types=types).sliding_windows == (None, 8, None, 8)


def test_qwen_has_windows_where_it_says_so() -> None:
    qwen = {"architectures": ["Qwen2ForCausalLM"], "sliding_window": 7, "max_window_layers": 3}
    types = ["sliding_attention", "full_attention", "full_attention", "sliding_attention"]

    assert parse(**qwen).sliding_windows == (None,) * 4
    assert parse(**qwen, use_sliding_window=True).sliding_windows == (None, None, None, 7)
    assert parse(**qwen, use_sliding_window=True, layer_types=types).sliding_windows == (7, None, None, 7)
    with pytest.raises(ConfigError, match="layer_types must name"):
        parse(**qwen, use_sliding_window=True, layer_types=types[1:])


def test_mixtral_has_defaults_of_its_own() -> None:
    mixtral = parse(architectures=["MixtralForCausalLM"])

    assert (mixtral.num_local_experts, mixtral.num_experts_per_tok, mixtral.rotary.theta) == (8, 2, 1e6)
    assert mixtral.sliding_windows == (None,) * 4
    with pytest.raises(ConfigError, match="num_experts_per_tok=9 must be at most num_local_experts=8"):
        parse(architectures=["MixtralForCausalLM"], num_experts_per_tok=9)


def test_falcon_7b_and_40b_as_they_were_published() -> None:
    shape = {"architectures": ["FalconForCausalLM"], "vocab_size": 65024, "bias": False, "alibi": False}
    old = {"hidden_size": 4544, "num_attention_heads": 71, "multi_query": True, "parallel_attn": True}
    new = {"hidden_size": 8192, "num_attention_heads": 128, "num_kv_heads": 8, "new_decoder_architecture": True}
    both = (parse(**shape, **keys, max_position_embeddings=None, dtype="bfloat16") for keys in (old, new))

    falcon_7b, falcon_40b = both

    assert (falcon_7b.num_key_value_heads, falcon_7b.head_dim, falcon_7b.intermediate_size) == (1, 64, 4 * 4544)
    assert (falcon_40b.num_key_value_heads, falcon_40b.head_dim, falcon_40b.intermediate_size) == (8, 64, 4 * 8192)
    assert (falcon_7b.has_mlp_norm, falcon_40b.has_mlp_norm) == (False, True)
    assert (falcon_7b.weight_names.input_norm, falcon_40b.weight_names.input_norm) == ("input_layernorm", "ln_attn")
    assert falcon_7b.tie_word_embeddings and falcon_7b.max_model_len == 2048


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"alibi": True}, "config.json: alibi is not supported; use a Falcon with rotary embeddings"),
        ({"activation": "relu"}, "activation 'relu' is not supported; only gelu is"),
        ({"num_ln_in_parallel_attn": 2}, "num_ln_in_parallel_attn=2 is not supported here"),
        ({"num_attention_heads": 5}, "hidden_size=32 is not a multiple of num_attention_heads=5"),
        ({"quantization_config": {"quant_method": "gptq"}}, "quantized checkpoints are not supported"),
    ],
)
def test_a_falcon_that_cannot_be_run_is_refused(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse(architectures=["FalconForCausalLM"], **keys)


@pytest.mark.parametrize(("num_layers", "num_stages"), [(4, 1), (4, 4), (7, 3), (80, 6)])
def test_stages_share_the_layers_evenly(num_layers: int, num_stages: int) -> None:
    stages = [stage_layers(num_layers, num_stages, stage) for stage in range(num_stages)]

    assert [layer for layers in stages for layer in layers] == list(range(num_layers))
    assert {len(layers) for layers in stages} <= {num_layers // num_stages, -(-num_layers // num_stages)}
    assert len(stages[-1]) == num_layers // num_stages


def test_more_stages_than_layers_are_refused() -> None:
    with pytest.raises(ConfigError, match="4 layers cannot be split over 5 stages; use at most 4"):
        stage_layers(4, 5, 0)
