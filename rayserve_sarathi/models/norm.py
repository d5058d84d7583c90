"""The norms of a decoder, by kind.

Dimensions: T tokens in the step; D hidden size.
"""

from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from rayserve_sarathi.kernels.layer_norm import layer_norm
from rayserve_sarathi.kernels.rms_norm import add_rms_norm, rms_norm
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.parameters import Weights


class Norm(Protocol):
    """A normalisation with weights of its own."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return the norm of x, [T, D]."""

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """Return the norm of the sum of x and residual, and the sum, all [T, D]."""


class RmsNorm:
    """Root-mean-square norm, without a bias."""

    def __init__(self, weights: Weights, name: str, *, eps: float) -> None:
        self.weight = weights.pop(name)
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        return rms_norm(x, self.weight, eps=self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Norm`."""
        return add_rms_norm(x, residual, self.weight, eps=self._eps)


class LayerNorm:
    """Layer norm, with a bias."""

    def __init__(self, weights: Weights, name: str, *, eps: float) -> None:
        self._weight = weights.pop(name)
        self._bias = weights.pop(f"{name}_bias")
        self._eps = eps

    def __call__(self, x: Tensor) -> Tensor:
        """See `Norm`."""
        return layer_norm(x, self._weight, self._bias, eps=self._eps)

    def add(self, x: Tensor, residual: Tensor) -> tuple[Tensor, Tensor]:
        """See `Norm`."""
        total = x + residual
        return self(total), total


def take_norm(config: DecoderConfig, weights: Weights, name: str) -> Norm:
    """Take the norm of a name out of the weights."""
    kinds: dict[str, Callable[..., Norm]] = {"rms_norm": RmsNorm, "layer_norm": LayerNorm}
    return kinds[config.norm](weights, name, eps=config.norm_eps)
