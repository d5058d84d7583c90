"""The way to a GPU: which Triton kernels can be had (torch brings Triton in its builds for GPUs alone), and copies."""

import functools
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor


def fused_for(x: Tensor) -> ModuleType | None:
    """Return `kernels.fused` if its kernels compute on tensors like this one, on a GPU; None if not."""
    return _module("fused") if x.is_cuda else None


def sampling_for(logits: Tensor) -> ModuleType | None:
    """Return `kernels.sampling` if it draws from logits like these, on a GPU; None if not."""
    return _module("sampling") if logits.is_cuda else None


def on_device(tensor: Tensor, device: torch.device) -> Tensor:
    """Return a tensor of the host's on a device, a GPU's in the order of what it has to do.

    From memory that is not pinned the host would wait until the GPU has done all that it was given before.
    """
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor


@functools.cache
def _module(name: str) -> ModuleType | None:
    return import_module(f"rayserve_sarathi.kernels.{name}") if find_spec("triton") else None
