"""The gated activation of Llama-like MLPs (SwiGLU; Shazeer, 2020).

Dimensions: T tokens in the step; F intermediate size.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.gpu import fused_for
from rayserve_sarathi.kernels.native import kernels_for


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, F], of gate and up side by side, [T, 2 * F]."""
    fused = fused_for(gate_up)
    if fused is not None:
        activated: Tensor = fused.silu_mul(gate_up)
        return activated
    num_rows, size = gate_up.shape[0], gate_up.shape[1] // 2
    kernels = kernels_for(gate_up, row_size=size)
    if kernels is None:
        gate, up = gate_up.chunk(2, dim=-1)
        return F.silu(gate).mul_(up)
    gate_up = gate_up.contiguous()
    y = torch.empty((num_rows, size), dtype=gate_up.dtype)
    kernels.sarathi_silu_mul(gate_up.data_ptr(), y.data_ptr(), num_rows, size)
    return y
