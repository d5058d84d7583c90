"""The shapes of published models, as their `config.json` says them; no weights, no tokenizers."""

import json
from pathlib import Path
from typing import Any

CONFIGS: dict[str, dict[str, Any]] = {
    "mistralai/Mistral-7B-v0.1": {
        "architectures": ["MistralForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "max_position_embeddings": 32768,
        "sliding_window": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "01-ai/Yi-34B": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 64000,
        "hidden_size": 7168,
        "intermediate_size": 20480,
        "num_hidden_layers": 60,
        "num_attention_heads": 56,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 5000000.0,
        "eos_token_id": 2,
        "torch_dtype": "bfloat16",
    },
    "meta-llama/Llama-2-70b-hf": {
        "architectures": ["LlamaForCausalLM"],
        "vocab_size": 32000,
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
        "num_key_value_heads": 8,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "eos_token_id": 2,
        "torch_dtype": "float16",
    },
    "tiiuae/falcon-180B": {
        "architectures": ["FalconForCausalLM"],
        "vocab_size": 65024,
        "hidden_size": 14848,
        "num_hidden_layers": 80,
        "num_attention_heads": 232,
        "num_kv_heads": 8,
        "new_decoder_architecture": True,
        "parallel_attn": True,
        "bias": False,
        "alibi": False,
        "layer_norm_epsilon": 1e-5,
        "eos_token_id": 11,
        "torch_dtype": "bfloat16",
    },
}


def save_config(folder: Path, model: str) -> Path:
    """Write the `config.json` of a published model, and nothing else."""
    (folder / "config.json").write_text(json.dumps(CONFIGS[model]))
    return folder
