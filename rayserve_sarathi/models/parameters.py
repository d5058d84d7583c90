"""The tensors that a stage needs, by our names, and the checkpoint tensors that each is made of.

Dimensions: N query and K KV heads; H head size; D hidden size; F intermediate size; V vocabulary.
"""

from dataclasses import dataclass

from rayserve_sarathi.models.config import DecoderConfig

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorSpec:
    """A tensor of the checkpoint."""

    name: str
    shape: tuple[int, ...]


Parameters = dict[str, tuple[TensorSpec, ...]]
"""Our name of a parameter -> the checkpoint tensors that are stacked along their first dimension to make it."""


def stage_parameters(config: DecoderConfig, layers: range) -> Parameters:
    """Return the parameters of the stage that holds `layers`.

    The first stage has the embedding, the last one the final norm and the head. With tied embeddings the head is the
    embedding: a single stage has it once, and the last of several has a copy.
    """
    is_first, is_last = layers.start == 0, layers.stop == config.num_hidden_layers
    embedding = (config.vocab_size, config.hidden_size)
    parameters: Parameters = {}
    if is_first:
        parameters["embedding"] = (TensorSpec(name=EMBEDDING, shape=embedding),)
    for layer in layers:
        parameters |= _layer_parameters(config, layer)
    if is_last:
        parameters["norm"] = (TensorSpec(name="model.norm.weight", shape=(config.hidden_size,)),)
    if is_last and not (is_first and config.tie_word_embeddings):
        parameters["head"] = (TensorSpec(name=EMBEDDING if config.tie_word_embeddings else HEAD, shape=embedding),)
    return parameters


def _layer_parameters(config: DecoderConfig, layer: int) -> Parameters:
    hf = f"model.layers.{layer}"
    names = config.weight_names
    hidden, intermediate, head = config.hidden_size, config.intermediate_size, config.head_dim
    q_size, kv_size = config.num_attention_heads * head, config.num_key_value_heads * head

    def specs(shape: tuple[int, ...], *tensors: str) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(name=f"{hf}.{tensor}", shape=shape) for tensor in tensors)

    parameters: Parameters = {
        "input_norm": specs((hidden,), f"{names.input_norm}.weight"),
        "qkv": specs((q_size, hidden), "self_attn.q_proj.weight")
        + specs((kv_size, hidden), "self_attn.k_proj.weight", "self_attn.v_proj.weight"),
        "o": specs((hidden, q_size), "self_attn.o_proj.weight"),
        "post_attention_norm": specs((hidden,), f"{names.post_attention_norm}.weight"),
        "gate_up": specs((intermediate, hidden), "mlp.gate_proj.weight", "mlp.up_proj.weight"),
        "down": specs((hidden, intermediate), "mlp.down_proj.weight"),
    }
    if config.has_qkv_bias:
        parameters["qkv_bias"] = specs((q_size,), "self_attn.q_proj.bias") + specs(
            (kv_size,), "self_attn.k_proj.bias", "self_attn.v_proj.bias"
        )
    if config.has_o_bias:
        parameters["o_bias"] = specs((hidden,), "self_attn.o_proj.bias")
    if config.has_mlp_bias:
        parameters["gate_up_bias"] = specs((intermediate,), "mlp.gate_proj.bias", "mlp.up_proj.bias")
        parameters["down_bias"] = specs((hidden,), "mlp.down_proj.bias")
    if config.has_qk_norm:
        parameters["q_norm"] = specs((head,), "self_attn.q_norm.weight")
        parameters["k_norm"] = specs((head,), "self_attn.k_norm.weight")
    return {f"layers.{layer}.{name}": spec for name, spec in parameters.items()}
