"""Rotary position embedding (Su et al., 2021), with the frequency scalings of long-context checkpoints.

Dimensions: T tokens in the step; N heads; H head size.
"""

import math

import torch
from torch import Tensor

from rayserve_sarathi.kernels.native import kernels_for


def inverse_frequencies(head_size: int, *, theta: float) -> Tensor:
    """Return the angle per position of each pair of dimensions, [H / 2] float32."""
    exponent = torch.arange(0, head_size, 2, dtype=torch.float32) / head_size
    return 1.0 / theta**exponent


def scale_llama3(
    frequencies: Tensor, *, factor: float, low_freq_factor: float, high_freq_factor: float, original_len: int
) -> Tensor:
    """Stretch low frequencies by `factor`, keep high ones, and blend between (Llama 3.1).

    Args:
        frequencies: [H / 2] float32.
        factor: How much longer the context becomes.
        low_freq_factor: Frequencies with fewer turns than this in `original_len` are low.
        high_freq_factor: Frequencies with more turns than this in `original_len` are high.
        original_len: Context that the model was first trained on.
    """
    turns = original_len * frequencies / (2 * math.pi)
    share_kept = ((turns - low_freq_factor) / (high_freq_factor - low_freq_factor)).clamp(0, 1)
    return frequencies * (share_kept + (1 - share_kept) / factor)


def scale_yarn(
    frequencies: Tensor,
    *,
    theta: float,
    factor: float,
    beta_fast: float,
    beta_slow: float,
    original_len: int,
    truncate: bool,
) -> Tensor:
    """Stretch low frequencies by `factor`, keep high ones, and blend linearly over the dimensions (YaRN, Peng 2023).

    Args:
        frequencies: [H / 2] float32.
        theta: Base that they came from.
        factor: How much longer the context becomes.
        beta_fast: Frequencies with more turns than this in `original_len` are high.
        beta_slow: Frequencies with fewer turns than this in `original_len` are low.
        original_len: Context that the model was first trained on.
        truncate: Whether to round the dimensions where the blend begins and ends outwards.
    """
    head_size = 2 * len(frequencies)

    def dimension_with(turns: float) -> float:
        return head_size * math.log(original_len / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low, high = dimension_with(beta_fast), dimension_with(beta_slow)
    if truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_size - 1)
    width = high - low if high != low else 0.001
    share_kept = 1 - ((torch.arange(len(frequencies), dtype=torch.float32) - low) / width).clamp(0, 1)
    return frequencies * (share_kept + (1 - share_kept) / factor)


def rotary_cos_sin(positions: Tensor, frequencies: Tensor, *, attention_factor: float) -> tuple[Tensor, Tensor]:
    """Return cosine and sine of each token's angles times `attention_factor`.

    Args:
        positions: [T] int32.
        frequencies: [H / 2] float32.
        attention_factor: 1, except for YaRN.

    Returns:
        Two of [T, 1, H / 2] float32.
    """
    angles = (positions[:, None].float() * frequencies)[:, None, :]
    if attention_factor == 1:
        return angles.cos(), angles.sin()
    return angles.cos() * attention_factor, angles.sin() * attention_factor


def rotate_qkv(qkv: Tensor, cos: Tensor, sin: Tensor, *, num_kv_heads: int) -> tuple[Tensor, Tensor, Tensor]:
    """Return rotated queries, [T, N, H], rotated keys, [T, K, H], and values, [T, K, H], of qkv, [T, N + 2 K, H].

    Args:
        qkv: May be changed.
        cos: [T, 1, H / 2] float32; `sin` likewise.
        num_kv_heads: K.
    """
    num_rotated = qkv.shape[1] - num_kv_heads
    qk = apply_rotary(qkv[:, :num_rotated], cos, sin)
    return qk[:, : num_rotated - num_kv_heads], qk[:, num_rotated - num_kv_heads :], qkv[:, num_rotated:]


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate queries or keys, pairing dimension i with i + H / 2 as Hugging Face checkpoints do.

    Args:
        x: [T, N, H].
        cos: [T, 1, H / 2] float32; `sin` likewise.

    Returns:
        [T, N, H]; it may be x itself, rotated in place.
    """
    num_tokens, num_heads, head_size = x.shape
    kernels = kernels_for(x)
    if kernels is not None and x.stride()[1:] == (head_size, 1) and x.stride(0) >= num_heads * head_size:
        cos, sin = cos.contiguous(), sin.contiguous()
        kernels.sarathi_rotary(
            x.data_ptr(), x.stride(0), cos.data_ptr(), sin.data_ptr(), num_tokens, num_heads, head_size
        )
        return x
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)
