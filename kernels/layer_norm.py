"""Layer normalisation (Ba et al., 2016).

Dimensions: D size of what is normalised.
"""

import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, *, eps: float) -> Tensor:
    """Scale x, [..., D], to zero mean and unit variance, multiply by weight, [D], and add bias, [D]."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)
