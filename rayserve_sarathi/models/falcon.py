"""Falcon 7B, 40B, 180B and Falcon 2: layer norms, attention beside the MLP, one tensor for queries, keys and values.

Almazrouei et al., 2023.
"""

from dataclasses import replace

from rayserve_sarathi.models.config import DecoderConfig, WeightNames
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.parse import check_not_quantized, parse_dtype, parse_rotary, scaled_max_model_len

_NAMES = WeightNames(
    embedding="transformer.word_embeddings",
    norm="transformer.ln_f",
    layers="transformer.h",
    qkv=("self_attention.query_key_value",),
    o="self_attention.dense",
    up=("mlp.dense_h_to_4h",),
    down="mlp.dense_4h_to_h",
)
# With a norm each for attention and MLP these have names of their own.
_NAMES_OF_TWO_NORMS = replace(_NAMES, input_norm="ln_attn", mlp_norm="ln_mlp")


def parse_falcon(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `FalconForCausalLM`. Defaults are those of transformers.

    Raises:
        ConfigError: A key is missing or malformed, or asks for something that is not built in.
    """
    check_not_quantized(hf)
    if hf.boolean("alibi", default=False):
        raise hf.error("alibi is not supported; use a Falcon with rotary embeddings, such as falcon-7b")
    if (activation := hf.string("activation", "gelu")) != "gelu":
        raise hf.error(f"activation {activation!r} is not supported; only gelu is")
    hidden_size, num_heads = hf.integer("hidden_size"), hf.integer("num_attention_heads")
    if hidden_size % num_heads:
        raise hf.error(f"hidden_size={hidden_size} is not a multiple of num_attention_heads={num_heads}")
    is_new = hf.boolean("new_decoder_architecture", default=False)
    is_parallel = is_new or hf.boolean("parallel_attn", default=True)
    num_norms = hf.integer("num_ln_in_parallel_attn", 2 if is_new else 1)
    if num_norms > (2 if is_new or not is_parallel else 1):
        raise hf.error(
            f"num_ln_in_parallel_attn={num_norms} is not supported here; only new_decoder_architecture has 1 or 2"
        )
    num_layers = hf.integer("num_hidden_layers")
    positions = hf.integer("max_position_embeddings", 2048)
    rotary = parse_rotary(hf, max_position_embeddings=positions)
    has_bias = hf.boolean("bias", default=False)
    return DecoderConfig(
        vocab_size=hf.integer("vocab_size"),
        hidden_size=hidden_size,
        intermediate_size=hf.integer("ffn_hidden_size", 4 * hidden_size),
        num_hidden_layers=num_layers,
        num_attention_heads=num_heads,
        num_key_value_heads=_num_kv_heads(hf, num_heads, is_new=is_new),
        head_dim=hidden_size // num_heads,
        norm_eps=hf.number("layer_norm_epsilon", 1e-5),
        max_model_len=scaled_max_model_len(positions, rotary),
        rotary=rotary,
        tie_word_embeddings=hf.boolean("tie_word_embeddings", default=True),
        sliding_windows=(None,) * num_layers,
        dtype=parse_dtype(hf),
        norm="layer_norm",
        layout="parallel" if is_parallel else "sequential",
        has_mlp_norm=num_norms == 2 or not is_parallel,
        mlp="gelu",
        has_qkv_bias=has_bias,
        has_o_bias=has_bias,
        has_mlp_bias=has_bias,
        weight_names=_NAMES_OF_TWO_NORMS if is_parallel and num_norms == 2 else _NAMES,
    )


def _num_kv_heads(hf: HfConfig, num_heads: int, *, is_new: bool) -> int:
    if is_new:
        return hf.integer("num_kv_heads", num_heads)
    # The old architecture has a KV head for all query heads, or for each, whatever num_kv_heads says.
    return 1 if hf.boolean("multi_query", default=True) else num_heads
