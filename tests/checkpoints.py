"""Tiny checkpoints with random weights, written by transformers itself, so that it is the judge of ours."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import (
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

VOCAB_SIZE = 97
_COMMON = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "eos_token_id": 2,
    # Larger than is usual, so that the logits depend on everything.
    "initializer_range": 0.3,
}
_LLAMA = {**_COMMON, "intermediate_size": 48, "num_key_value_heads": 2, "rms_norm_eps": 1e-5}
_FALCON = {**_COMMON, "ffn_hidden_size": 48, "layer_norm_epsilon": 1e-3}


@dataclass(frozen=True, slots=True, kw_only=True)
class Family:
    """A model of transformers and the settings that make it interesting."""

    config: Any
    model: type[PreTrainedModel]
    settings: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=lambda: _LLAMA)


_LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 32,
}
_YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32}

FAMILIES = {
    "llama": Family(config=LlamaConfig, model=LlamaForCausalLM, settings={}),
    "llama-biases": Family(
        config=LlamaConfig, model=LlamaForCausalLM, settings={"attention_bias": True, "mlp_bias": True}
    ),
    "llama3-tied": Family(
        config=LlamaConfig,
        model=LlamaForCausalLM,
        settings={"rope_parameters": _LLAMA3, "tie_word_embeddings": True},
    ),
    "llama-linear": Family(
        config=LlamaConfig,
        model=LlamaForCausalLM,
        settings={"rope_parameters": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 2.0}},
    ),
    # The shape of Yi: many query heads to a KV head, and a large rotary base.
    "yi-shaped": Family(
        config=LlamaConfig,
        model=LlamaForCausalLM,
        settings={
            "num_attention_heads": 8,
            "num_key_value_heads": 1,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000000.0},
        },
    ),
    "mistral-window": Family(config=MistralConfig, model=MistralForCausalLM, settings={"sliding_window": 7}),
    "mistral-head-dim": Family(
        config=MistralConfig, model=MistralForCausalLM, settings={"sliding_window": None, "head_dim": 12}
    ),
    "mixtral": Family(config=MixtralConfig, model=MixtralForCausalLM, settings={"num_local_experts": 4}),
    # More experts than a step has tokens, and one for each.
    "mixtral-window": Family(
        config=MixtralConfig,
        model=MixtralForCausalLM,
        settings={"num_local_experts": 50, "num_experts_per_tok": 1, "sliding_window": 6},
    ),
    "qwen2": Family(config=Qwen2Config, model=Qwen2ForCausalLM, settings={}),
    "qwen2-window": Family(
        config=Qwen2Config,
        model=Qwen2ForCausalLM,
        settings={"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    ),
    "qwen2-yarn": Family(config=Qwen2Config, model=Qwen2ForCausalLM, settings={"rope_parameters": _YARN}),
    "qwen3": Family(config=Qwen3Config, model=Qwen3ForCausalLM, settings={"head_dim": 16}),
    "falcon-7b": Family(config=FalconConfig, model=FalconForCausalLM, shape=_FALCON, settings={}),
    "falcon-7b-biases": Family(config=FalconConfig, model=FalconForCausalLM, shape=_FALCON, settings={"bias": True}),
    "falcon-40b": Family(
        config=FalconConfig,
        model=FalconForCausalLM,
        shape=_FALCON,
        settings={"new_decoder_architecture": True, "num_kv_heads": 2},
    ),
    "falcon2-11b": Family(
        config=FalconConfig,
        model=FalconForCausalLM,
        shape=_FALCON,
        settings={
            "new_decoder_architecture": True,
            "num_kv_heads": 2,
            "num_ln_in_parallel_attn": 1,
            "tie_word_embeddings": False,
            "rope_parameters": {"rope_type": "default", "rope_theta": 5000042.0},
        },
    ),
    "falcon-sequential": Family(
        config=FalconConfig,
        model=FalconForCausalLM,
        shape=_FALCON,
        settings={"parallel_attn": False, "multi_query": False, "bias": True},
    ),
}


def save_checkpoint(folder: Path, family: str, *, seed: int = 0, **settings: Any) -> PreTrainedModel:
    """Write a checkpoint and return transformers' model of it, in float32."""
    torch.manual_seed(seed)
    chosen = FAMILIES[family]
    model = chosen.model(chosen.config(**{**chosen.shape, **chosen.settings, **settings})).eval()
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            # Transformers starts norms at 1 and biases at 0, where mixing them up would not show.
            torch.nn.init.normal_(parameter, mean=float(name.endswith(".weight")), std=0.3)
    model.save_pretrained(folder)
    return model


def hf_logits(model: PreTrainedModel, token_ids: list[int]) -> torch.Tensor:
    """Return transformers' logits at each position of one request, [len(token_ids), V]."""
    with torch.inference_mode():
        return model(torch.tensor([token_ids])).logits[0]
