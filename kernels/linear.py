"""Matrix multiplication with a weight that is laid out once for the machine.

Dimensions: T tokens in the step; I inputs; O outputs.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

# A call of oneDNN costs 20 microseconds more than one of MKL, which outweighs the gain for smaller weights.
_MIN_PACKED_ELEMENTS = 1 << 17


class Linear:
    """y = x W^T + b, x being [T, I] and y [T, O].

    In float32 on a CPU the weight is packed for oneDNN: `F.linear` goes to MKL there, which is slow for few rows.
    2 cores, O = 3072, I = 768, microseconds for 1 / 4 / 16 / 64 / 512 rows: 667 / 1379 / 1388 / 3147 / 18759 unpacked,
    381 / 484 / 854 / 2473 / 16743 packed.

    Args:
        weight: [O, I]. Packing makes a copy, so drop it to save the memory.
        bias: [O], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self._is_packed = can_pack(weight)
        self._weight = torch.ops.mkldnn._reorder_linear_weight(weight) if self._is_packed else weight
        self._bias = bias

    def __call__(self, x: Tensor) -> Tensor:
        """Return y, [T, O], for x, [T, I]."""
        if self._is_packed:
            # The operators that torch's own compiler emits; they have no public name.
            y: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._weight, self._bias, "none", [], "")
            return y
        return F.linear(x, self._weight, self._bias)


def can_pack(weight: Tensor) -> bool:
    """Say whether this weight gains from oneDNN's packed float32 multiplication, and this machine has it."""
    return (
        weight.numel() >= _MIN_PACKED_ELEMENTS
        and weight.device.type == "cpu"
        and weight.dtype == torch.float32
        and torch.backends.mkldnn.is_available()  # type: ignore[no-untyped-call]  # untyped in torch
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
    )
