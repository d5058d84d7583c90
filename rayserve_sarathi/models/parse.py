"""Parse the `config.json` of a Hugging Face checkpoint into a `DecoderConfig`: what families have in common."""

import math
from collections.abc import Sequence
from typing import Literal

from rayserve_sarathi.models.config import (
    DecoderConfig,
    LinearScaling,
    Llama3Scaling,
    RotaryConfig,
    WeightNames,
    YarnScaling,
)
from rayserve_sarathi.models.hf_config import HfConfig

QUANTIZED = "quantized checkpoints are not supported; use the float16 or bfloat16 original"
_DTYPES: dict[str, Literal["float32", "bfloat16", "float16"]] = {
    "float32": "float32",
    "bfloat16": "bfloat16",
    "float16": "float16",
}


def parse_decoder(
    hf: HfConfig,
    *,
    sliding_windows: Sequence[int | None] | None = None,
    has_qkv_bias: bool = False,
    has_o_bias: bool = False,
    has_mlp_bias: bool = False,
    has_qk_norm: bool = False,
    weight_names: WeightNames | None = None,
    default_head_dim: int | None = None,
    default_num_kv_heads: int | None = None,
    default_norm_eps: float = 1e-6,
    default_rope_theta: float = 10000.0,
) -> DecoderConfig:
    """Parse what all families share; a family passes what is its own.

    Args:
        hf: The checkpoint's config.
        sliding_windows: Of each layer; None for no windows at all.
        has_qkv_bias: See `DecoderConfig`, as for the other flags.
        weight_names: None for Llama's.
        default_head_dim: When the config has none; None divides `hidden_size` by the heads.
        default_num_kv_heads: When the config has no such key; None, or a null in the config, takes the query heads'.
        default_norm_eps: When the config has none.
        default_rope_theta: When the config has none.

    Raises:
        ConfigError: A key is missing or malformed, or asks for something that is not built in.
    """
    check_not_quantized(hf)
    if (activation := hf.string("hidden_act", "silu")) != "silu":
        raise hf.error(f"hidden_act {activation!r} is not supported; only silu is")
    num_layers = hf.integer("num_hidden_layers")
    num_heads = hf.integer("num_attention_heads")
    hidden_size = hf.integer("hidden_size")
    if default_head_dim is None and "head_dim" not in hf and hidden_size % num_heads:
        raise hf.error(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}; set head_dim")
    if default_num_kv_heads is None or hf.is_null("num_key_value_heads"):
        default_num_kv_heads = num_heads
    positions = hf.integer("max_position_embeddings")
    rotary = parse_rotary(hf, max_position_embeddings=positions, default_theta=default_rope_theta)
    return DecoderConfig(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf.integer("intermediate_size"),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=hf.integer("num_key_value_heads", default_num_kv_heads),
        head_dim=hf.integer("head_dim", default_head_dim or hidden_size // num_heads),
        norm_eps=hf.number("rms_norm_eps", default_norm_eps),
        max_model_len=scaled_max_model_len(positions, rotary),
        rotary=rotary,
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=False),
        sliding_windows=tuple(sliding_windows or (None,) * num_layers),
        dtype=parse_dtype(hf),
        has_qkv_bias=has_qkv_bias,
        has_o_bias=has_o_bias,
        has_mlp_bias=has_mlp_bias,
        has_qk_norm=has_qk_norm,
        weight_names=weight_names or WeightNames(),
    )


def parse_layer_types(hf: HfConfig, window: int) -> list[int | None] | None:
    """Return each layer's window as `layer_types` says, or None if the config has no such list.

    Raises:
        ConfigError: It names other types, or not as many as there are layers.
    """
    num_layers = hf.integer("num_hidden_layers")
    if not (layer_types := hf.strings("layer_types")):
        return None
    if len(layer_types) != num_layers or not set(layer_types) <= {"full_attention", "sliding_attention"}:
        raise hf.error(
            f"layer_types must name full_attention or sliding_attention for each of {num_layers} layers,"
            f" got {list(layer_types)}"
        )
    return [window if layer_type == "sliding_attention" else None for layer_type in layer_types]


def check_not_quantized(hf: HfConfig) -> None:
    """Return if the weights are plain numbers.

    Raises:
        ConfigError: They are not.
    """
    if "quantization_config" in hf:
        raise hf.error(QUANTIZED)


def parse_dtype(hf: HfConfig) -> Literal["float32", "bfloat16", "float16"]:
    """Return the type of the checkpoint's weights."""
    # transformers 5 says dtype, 4 torch_dtype; a checkpoint that says neither is float32, as in torch.
    name = hf.string("dtype", hf.string("torch_dtype", "float32")).removeprefix("torch.")
    if name not in _DTYPES:
        raise hf.error(f"dtype {name!r} is not supported; use one of {sorted(_DTYPES)}")
    return _DTYPES[name]


def parse_rotary(hf: HfConfig, *, max_position_embeddings: int, default_theta: float = 10000.0) -> RotaryConfig:
    """Return the rotary embedding, in any of the spellings that transformers had.

    Args:
        hf: The checkpoint's config.
        max_position_embeddings: That of the config, or its family's default.
        default_theta: When the config has none.

    Raises:
        ConfigError: It is malformed or of an unknown type.
    """
    # transformers 5 keeps all of it under rope_parameters; 4 has rope_theta beside rope_scaling.
    rope = hf.section("rope_parameters") if "rope_parameters" in hf else hf.section("rope_scaling")
    theta = rope.number("rope_theta", hf.number("rope_theta", default_theta))
    if rope.number("partial_rotary_factor", hf.number("partial_rotary_factor", 1.0)) != 1:
        raise hf.error("partial_rotary_factor other than 1 is not supported")
    original_len = rope.integer("original_max_position_embeddings", max_position_embeddings)
    match rope_type := rope.string("rope_type", rope.string("type", "default")):
        case "default":
            return RotaryConfig(theta=theta)
        case "linear":
            return RotaryConfig(theta=theta, scaling=LinearScaling(factor=rope.number("factor")))
        case "llama3":
            scaling = Llama3Scaling(
                factor=rope.number("factor"),
                low_freq_factor=rope.number("low_freq_factor"),
                high_freq_factor=rope.number("high_freq_factor"),
                original_len=original_len,
            )
            if scaling.high_freq_factor <= scaling.low_freq_factor:
                raise rope.error("high_freq_factor must be greater than low_freq_factor")
            return RotaryConfig(theta=theta, scaling=scaling)
        case "yarn":
            return RotaryConfig(theta=theta, scaling=_parse_yarn(rope, original_len))
    raise rope.error(f"rope_type {rope_type!r} is not supported; use one of ['default', 'linear', 'llama3', 'yarn']")


def scaled_max_model_len(max_position_embeddings: int, rotary: RotaryConfig) -> int:
    """Return how many tokens a request may have once the rotary embedding is scaled."""
    match rotary.scaling:
        case LinearScaling(factor=factor):
            return int(max_position_embeddings * factor)
        case YarnScaling(factor=factor, original_len=original_len):
            # Checkpoints give the length before or after scaling here; it is never less than the one after.
            return max(max_position_embeddings, int(original_len * factor))
    return max_position_embeddings


def _parse_yarn(rope: HfConfig, original_len: int) -> YarnScaling:
    factor = rope.number("factor")

    def magnitude(scale: float) -> float:
        return 0.1 * scale * math.log(factor) + 1.0 if factor > 1 else 1.0

    attention_factor = magnitude(1.0)
    if "mscale" in rope and "mscale_all_dim" in rope:
        attention_factor = magnitude(rope.number("mscale")) / magnitude(rope.number("mscale_all_dim"))
    return YarnScaling(
        factor=factor,
        beta_fast=rope.number("beta_fast", 32.0),
        beta_slow=rope.number("beta_slow", 1.0),
        original_len=original_len,
        truncate=rope.boolean("truncate", default=True),
        attention_factor=rope.number("attention_factor", attention_factor),
    )
