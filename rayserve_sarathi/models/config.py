"""A decoder's shape, and which of its layers a stage has."""

from dataclasses import dataclass
from typing import Literal

from rayserve_sarathi.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearScaling:
    """Rotary angles divided by `factor`."""

    factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Llama3Scaling:
    """Llama 3.1's scaling; see `kernels.rotary.scale_llama3`."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class YarnScaling:
    """YaRN's scaling; see `kernels.rotary.scale_yarn`."""

    factor: float
    beta_fast: float
    beta_slow: float
    original_len: int
    truncate: bool
    attention_factor: float


@dataclass(frozen=True, slots=True, kw_only=True)
class RotaryConfig:
    """Rotary embedding; `scaling` is None for the plain one."""

    theta: float
    scaling: LinearScaling | Llama3Scaling | YarnScaling | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightNames:
    """What a family calls its tensors, less the `.weight` or `.bias` at the end.

    Args:
        layers: What stands before a layer's number; the names below are what stands after it.
        input_norm: Before attention.
        mlp_norm: Before the MLP.
        qkv: Three tensors; or one that holds, for each KV head, its query heads, its key and its value.
        up: Into the MLP: gate and up, or up alone where there is no gate. With experts, after an expert's number.
        down: Out of it; likewise.
        router: What chooses experts.
        experts: What stands before an expert's number.
    """

    embedding: str = "model.embed_tokens"
    norm: str = "model.norm"
    head: str = "lm_head"
    layers: str = "model.layers"
    input_norm: str = "input_layernorm"
    mlp_norm: str = "post_attention_layernorm"
    qkv: tuple[str, str, str] | tuple[str] = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
    q_norm: str = "self_attn.q_norm"
    k_norm: str = "self_attn.k_norm"
    o: str = "self_attn.o_proj"
    up: tuple[str, ...] = ("mlp.gate_proj", "mlp.up_proj")
    down: str = "mlp.down_proj"
    router: str = "mlp.gate"
    experts: str = "mlp.experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class DecoderConfig:
    """Everything the shared decoder needs to know. Names are those of Hugging Face configs where all families have one.

    Args:
        norm: `layer_norm` has a bias.
        layout: Whether the MLP comes after attention or beside it.
        has_mlp_norm: Whether the MLP has a norm of its own; beside attention it may share attention's.
        mlp: `gated` is silu(gate) * up, `gelu` has no gate, `experts` are several gated ones.
        num_local_experts: How many; 1 but for `experts`.
        num_experts_per_tok: How many of them a token goes through.
        max_model_len: Most tokens that the positions were made for, scaling included.
        sliding_windows: Of each layer; None sees everything.
        dtype: That of the checkpoint.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    norm_eps: float
    max_model_len: int
    rotary: RotaryConfig
    tie_word_embeddings: bool
    sliding_windows: tuple[int | None, ...]
    dtype: Literal["float32", "bfloat16", "float16"]
    norm: Literal["rms_norm", "layer_norm"] = "rms_norm"
    layout: Literal["sequential", "parallel"] = "sequential"
    has_mlp_norm: bool = True
    mlp: Literal["gated", "gelu", "experts"] = "gated"
    num_local_experts: int = 1
    num_experts_per_tok: int = 1
    has_qkv_bias: bool = False
    has_o_bias: bool = False
    has_mlp_bias: bool = False
    has_qk_norm: bool = False
    weight_names: WeightNames = WeightNames()

    def __post_init__(self) -> None:
        if self.num_attention_heads % self.num_key_value_heads:
            raise ConfigError(
                f"num_attention_heads={self.num_attention_heads} must be a multiple of"
                f" num_key_value_heads={self.num_key_value_heads}"
            )
        if self.head_dim % 2:
            raise ConfigError(f"head_dim must be even for rotary embeddings, got {self.head_dim}")
        if self.num_experts_per_tok > self.num_local_experts:
            raise ConfigError(
                f"num_experts_per_tok={self.num_experts_per_tok} must be at most"
                f" num_local_experts={self.num_local_experts}"
            )
        assert self.has_mlp_norm or self.layout == "parallel", "what follows attention needs a norm"
        assert len(self.sliding_windows) == self.num_hidden_layers, (self.sliding_windows, self.num_hidden_layers)


def stage_layers(num_layers: int, num_stages: int, stage: int) -> range:
    """Return the layers of a stage; when they do not divide, the first stages take one more.

    The last stage has the head and the sampler besides its layers, so it gets the smaller share.

    Raises:
        ConfigError: There are more stages than layers.
    """
    if num_stages > num_layers:
        raise ConfigError(f"{num_layers} layers cannot be split over {num_stages} stages; use at most {num_layers}")
    assert 0 <= stage < num_stages, (stage, num_stages)
    share, rest = divmod(num_layers, num_stages)
    first = stage * share + min(stage, rest)
    return range(first, first + share + (stage < rest))
