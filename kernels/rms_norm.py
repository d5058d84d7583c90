"""Root-mean-square normalisation (Zhang and Sennrich, 2019).

Dimensions: D size of what is normalised.
"""

import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scale x, [..., D], to unit mean square and multiply by weight, [D]."""
    return F.rms_norm(x, weight.shape, weight, eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum of x and residual, and the sum, all [..., D]; one kernel where a backend fuses."""
    total = x + residual
    return rms_norm(total, weight, eps=eps), total
