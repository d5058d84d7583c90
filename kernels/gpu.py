"""Whether the Triton kernels can be had: torch brings Triton in its builds for GPUs, and only there."""

import functools
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

from torch import Tensor


def fused_for(x: Tensor) -> ModuleType | None:
    """Return `kernels.fused` if its kernels compute on tensors like this one, on a GPU; None if not."""
    return _fused_or_none() if x.is_cuda else None


@functools.cache
def _fused_or_none() -> ModuleType | None:
    return import_module("rayserve_sarathi.kernels.fused") if find_spec("triton") else None
