"""The two halves of a decoder layer: attention and MLP.

Dimensions: T tokens in the step; N query and K KV heads; H head size; D hidden size.
"""

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.rms_norm import add_rms_norm, rms_norm
from rayserve_sarathi.kernels.rotary import (
    apply_rotary,
    inverse_frequencies,
    rotary_cos_sin,
    scale_llama3,
    scale_yarn,
)
from rayserve_sarathi.kernels.silu_mul import silu_mul
from rayserve_sarathi.models.config import DecoderConfig, LinearScaling, Llama3Scaling, YarnScaling

Weights = dict[str, Tensor]
"""Our names of parameters -> tensors. Layers take theirs out, so that a packed weight's original is freed at once."""


class RotaryEmbedding:
    """Angles by position, as the checkpoint scales them."""

    def __init__(self, config: DecoderConfig, *, device: torch.device) -> None:
        theta = config.rotary.theta
        frequencies = inverse_frequencies(config.head_dim, theta=theta)
        self._attention_factor = 1.0
        match config.rotary.scaling:
            case LinearScaling(factor=factor):
                frequencies = frequencies / factor
            case Llama3Scaling() as llama3:
                frequencies = scale_llama3(
                    frequencies,
                    factor=llama3.factor,
                    low_freq_factor=llama3.low_freq_factor,
                    high_freq_factor=llama3.high_freq_factor,
                    original_len=llama3.original_len,
                )
            case YarnScaling() as yarn:
                frequencies = scale_yarn(
                    frequencies,
                    theta=theta,
                    factor=yarn.factor,
                    beta_fast=yarn.beta_fast,
                    beta_slow=yarn.beta_slow,
                    original_len=yarn.original_len,
                    truncate=yarn.truncate,
                )
                self._attention_factor = yarn.attention_factor
        self._frequencies = frequencies.to(device)

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, [T, 1, H / 2] float32 each, at positions, [T] int64."""
        return rotary_cos_sin(positions, self._frequencies, attention_factor=self._attention_factor)


class Attention:
    """Causal self-attention of one layer over the paged KV cache."""

    def __init__(self, config: DecoderConfig, weights: Weights, *, layer: int, backend: AttentionBackend) -> None:
        prefix = f"layers.{layer}."
        self._num_heads = config.num_attention_heads
        self._num_kv_heads = config.num_key_value_heads
        self._head_size = config.head_dim
        self._eps = config.rms_norm_eps
        self._sliding_window = config.sliding_windows[layer]
        self._backend = backend
        self._qkv = Linear(weights.pop(f"{prefix}qkv"), weights.pop(f"{prefix}qkv_bias", None))
        self._o = Linear(weights.pop(f"{prefix}o"), weights.pop(f"{prefix}o_bias", None))
        self._qk_norms = (
            (weights.pop(f"{prefix}q_norm"), weights.pop(f"{prefix}k_norm")) if config.has_qk_norm else None
        )

    def __call__(
        self,
        x: Tensor,
        *,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Attend from x, [T, D], and return [T, D]; the new keys and values are stored in the caches."""
        num_rotated = self._num_heads + self._num_kv_heads
        qkv = self._qkv(x).view(len(x), -1, self._head_size)
        if self._qk_norms is not None:
            q_norm, k_norm = self._qk_norms
            qkv[:, : self._num_heads] = rms_norm(qkv[:, : self._num_heads], q_norm, eps=self._eps)
            qkv[:, self._num_heads : num_rotated] = rms_norm(
                qkv[:, self._num_heads : num_rotated], k_norm, eps=self._eps
            )
        qk = apply_rotary(qkv[:, :num_rotated], cos, sin)
        self._backend.write_kv(qk[:, self._num_heads :], qkv[:, num_rotated:], k_cache, v_cache, metadata=metadata)
        out = self._backend.attention(
            qk[:, : self._num_heads],
            k_cache,
            v_cache,
            metadata=metadata,
            scale=self._head_size**-0.5,
            sliding_window=self._sliding_window,
        )
        return self._o(out.flatten(1))


class DecoderLayer:
    """Attention and gated MLP, each behind a norm and beside a residual."""

    def __init__(self, config: DecoderConfig, weights: Weights, *, layer: int, backend: AttentionBackend) -> None:
        prefix = f"layers.{layer}."
        self._eps = config.rms_norm_eps
        self._input_norm = weights.pop(f"{prefix}input_norm")
        self._attention = Attention(config, weights, layer=layer, backend=backend)
        self._post_attention_norm = weights.pop(f"{prefix}post_attention_norm")
        self._gate_up = Linear(weights.pop(f"{prefix}gate_up"), weights.pop(f"{prefix}gate_up_bias", None))
        self._down = Linear(weights.pop(f"{prefix}down"), weights.pop(f"{prefix}down_bias", None))

    def __call__(
        self,
        hidden: Tensor,
        *,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
    ) -> Tensor:
        """Return the layer's output, [T, D], for hidden states, [T, D]."""
        x = rms_norm(hidden, self._input_norm, eps=self._eps)
        x = self._attention(x, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache, metadata=metadata)
        x, hidden = add_rms_norm(x, hidden, self._post_attention_norm, eps=self._eps)
        return hidden + self._down(silu_mul(self._gate_up(x)))
