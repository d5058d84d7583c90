"""Root-mean-square normalisation (Zhang and Sennrich, 2019).

Dimensions: D size of what is normalised.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.gpu import fused_for
from rayserve_sarathi.kernels.native import kernels_for


def rms_norm(x: Tensor, weight: Tensor, *, eps: float) -> Tensor:
    """Scale x, [..., D], to unit mean square and multiply by weight, [D]."""
    fused = fused_for(x)
    if fused is not None:
        normed: Tensor = fused.rms_norm(x, None, weight, eps=eps)[0]
        return normed
    kernels = kernels_for(x, row_size=x.shape[-1])
    if kernels is None:
        return F.rms_norm(x, weight.shape, weight, eps)
    x = x.contiguous()
    y = torch.empty_like(x)
    size = x.shape[-1]
    kernels.sarathi_rms_norm(x.data_ptr(), None, weight.data_ptr(), y.data_ptr(), None, x.numel() // size, size, eps)
    return y


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, *, eps: float) -> tuple[Tensor, Tensor]:
    """Return the norm of the sum of x and residual, and the sum, all [..., D]; one kernel where there is one."""
    fused = fused_for(x)
    if fused is not None:
        normed_and_sum: tuple[Tensor, Tensor] = fused.rms_norm(x, residual, weight, eps=eps)
        return normed_and_sum
    kernels = kernels_for(x, row_size=x.shape[-1])
    if kernels is None:
        total = x + residual
        return F.rms_norm(total, weight.shape, weight, eps), total
    x, residual = x.contiguous(), residual.contiguous()
    y, total = torch.empty_like(x), torch.empty_like(x)
    size = x.shape[-1]
    kernels.sarathi_rms_norm(
        *(x.data_ptr(), residual.data_ptr(), weight.data_ptr(), y.data_ptr(), total.data_ptr()),
        *(x.numel() // size, size, eps),
    )
    return y, total
