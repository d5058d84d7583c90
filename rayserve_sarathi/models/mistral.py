"""Mistral: Llama with a sliding window in its first versions (Jiang et al., 2023)."""

from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.parse import parse_decoder, parse_layer_types


def parse_mistral(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `MistralForCausalLM`. Defaults are those of transformers."""
    window = None if hf.is_null("sliding_window") else hf.integer("sliding_window", 4096)
    windows = None if window is None else parse_layer_types(hf, window)
    windows = windows or [window] * hf.integer("num_hidden_layers")
    return parse_decoder(hf, sliding_windows=windows, default_num_kv_heads=8)
