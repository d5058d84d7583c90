"""Mixtral: Mistral with experts in the place of the MLP (Jiang et al., 2024)."""

from dataclasses import replace

from rayserve_sarathi.models.config import DecoderConfig, WeightNames
from rayserve_sarathi.models.hf_config import HfConfig
from rayserve_sarathi.models.parse import parse_decoder

# Those of the published checkpoints; transformers 5 has others in memory and writes these.
_NAMES = WeightNames(router="block_sparse_moe.gate", experts="block_sparse_moe.experts", up=("w1", "w3"), down="w2")


def parse_mixtral(hf: HfConfig) -> DecoderConfig:
    """Parse the config of a `MixtralForCausalLM`. Defaults are those of transformers."""
    window = hf.integer("sliding_window") if "sliding_window" in hf else None
    decoder = parse_decoder(
        hf,
        sliding_windows=[window] * hf.integer("num_hidden_layers"),
        weight_names=_NAMES,
        default_num_kv_heads=8,
        default_norm_eps=1e-5,
        default_rope_theta=1e6,
    )
    return replace(
        decoder,
        mlp="experts",
        num_local_experts=hf.integer("num_local_experts", 8),
        num_experts_per_tok=hf.integer("num_experts_per_tok", 2),
    )
