"""Matrix multiplication with a weight that is laid out once for the machine.

Dimensions: T tokens in the step; I inputs; O outputs.
"""

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.native import kernels_for


class Linear:
    """y = x W^T + b, x being [T, I] and y [T, O].

    In float32 on a CPU the weight is laid out for the C++ kernel, if there is one: `F.linear` goes to MKL there, which
    is slow for few rows.

    Args:
        weight: [O, I]. Laying it out makes a copy, so drop it to save the memory.
        bias: [O], or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None = None) -> None:
        self.num_outputs = len(weight)
        self._kernels = kernels_for(weight)
        self._weight = weight if self._kernels is None else _pack(weight, self._kernels.sarathi_panel())
        self._bias = bias

    @property
    def is_packed(self) -> bool:
        """Whether the weight is laid out for the C++ kernels."""
        return self._kernels is not None

    @property
    def panels(self) -> Tensor:
        """The weight as the C++ kernels read it; only if it is packed."""
        assert self.is_packed, "the weight is plain"
        return self._weight

    @property
    def bias_pointer(self) -> int | None:
        """Where the bias is; None if there is none."""
        return None if self._bias is None else self._bias.data_ptr()

    def __call__(self, x: Tensor) -> Tensor:
        """Return y, [T, O], for x, [T, I]."""
        if self._kernels is None:
            return F.linear(x, self._weight, self._bias)
        x = x.contiguous()
        y = torch.empty((len(x), self.num_outputs), dtype=torch.float32)
        self._kernels.sarathi_linear(
            x.data_ptr(), *x.shape, self._weight.data_ptr(), self.num_outputs, self.bias_pointer, y.data_ptr()
        )
        return y


def _pack(weight: Tensor, panel: int) -> Tensor:
    """Return a weight, [O, I], in panels, [O / panel, I, panel], the last one filled up with zeros."""
    num_outputs, num_inputs = weight.shape
    padded = F.pad(weight, (0, 0, 0, -num_outputs % panel))
    return padded.view(-1, panel, num_inputs).transpose(1, 2).contiguous()
