"""Rotary position embedding, as the checkpoint scales it.

Dimensions: T tokens in the step; H head size.
"""

import torch
from torch import Tensor

from rayserve_sarathi.kernels.rotary import inverse_frequencies, rotary_cos_sin, scale_llama3, scale_yarn
from rayserve_sarathi.models.config import LinearScaling, Llama3Scaling, RotaryConfig, YarnScaling

_MIN_TABLE = 1024


class RotaryEmbedding:
    """Angles by position."""

    def __init__(self, config: RotaryConfig, *, head_size: int, device: torch.device) -> None:
        theta = config.theta
        frequencies = inverse_frequencies(head_size, theta=theta)
        self._attention_factor = 1.0
        match config.scaling:
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
        self._table = self(torch.empty(0, dtype=torch.int32, device=device))

    def __call__(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Return cosine and sine, [T, 1, H / 2] float32 each, at positions, [T] int32."""
        return rotary_cos_sin(positions, self._frequencies, attention_factor=self._attention_factor)

    def table(self, num_positions: int) -> tuple[Tensor, Tensor]:
        """Return cosine and sine at the first `num_positions` positions, or more, [positions, 1, H / 2] float32 each.

        They are kept, and made anew, twice as many, when there are too few: 131,072 positions are 64 MB, which most
        deployments of a long model never need, and take less time than a step with such a context.
        """
        if num_positions > self._table[0].shape[0]:
            count = max(_MIN_TABLE, 2 ** (num_positions - 1).bit_length())
            self._table = self(torch.arange(count, dtype=torch.int32, device=self._frequencies.device))
        return self._table
