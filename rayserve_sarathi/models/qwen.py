"""Qwen 2, 2.5 and 3: Llama with a sliding window in some layers; 2 has biases, 3 norms of queries and keys."""

from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.parse import parse_decoder, parse_layer_types


def parse_qwen2(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `Qwen2ForCausalLM`, which Qwen 2.5 is too."""
    return parse_decoder(hf, sliding_windows=_sliding_windows(hf), has_qkv_bias=True, default_num_kv_heads=32)


def parse_qwen3(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `Qwen3ForCausalLM`. Defaults are those of transformers."""
    has_attention_bias = hf.boolean("attention_bias", default=False)
    return parse_decoder(
        hf,
        sliding_windows=_sliding_windows(hf),
        has_qkv_bias=has_attention_bias,
        has_o_bias=has_attention_bias,
        has_qk_norm=True,
        default_head_dim=128,
        default_num_kv_heads=32,
    )


def _sliding_windows(hf: HfConfig) -> list[int | None]:
    num_layers = hf.integer("num_hidden_layers")
    if not hf.boolean("use_sliding_window", default=False) or hf.is_null("sliding_window"):
        return [None] * num_layers
    window = hf.integer("sliding_window", 4096)
    if (windows := parse_layer_types(hf, window)) is not None:
        return windows
    first = hf.integer("max_window_layers", 28, low=0)
    return [window if layer >= first else None for layer in range(num_layers)]
