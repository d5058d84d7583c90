"""The gated activation of Llama-like MLPs (SwiGLU; Shazeer, 2020).

Dimensions: T tokens in the step; F intermediate size.
"""

import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor


def silu_mul(gate_up: Tensor) -> Tensor:
    """Return silu(gate) * up, [T, F], of gate and up side by side, [T, 2 * F]."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)
