"""Llama 2 and 3, and what was published in their form: Yi, Vicuna, TinyLlama and others (Touvron et al., 2023)."""

from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.parse import parse_decoder


def parse_llama(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `LlamaForCausalLM`."""
    has_attention_bias = hf.boolean("attention_bias", default=False)
    return parse_decoder(
        hf,
        has_qkv_bias=has_attention_bias,
        has_o_bias=has_attention_bias,
        has_mlp_bias=hf.boolean("mlp_bias", default=False),
    )
