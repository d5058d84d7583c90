"""Sarathi-Serve's stall-free batching as an actor-model LLM serving engine on Ray Serve."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rayserve_sarathi.llm import LLM
    from rayserve_sarathi.request import SamplingParams

__all__ = ["LLM", "SamplingParams"]

_EXPORTS = {"LLM": "rayserve_sarathi.llm", "SamplingParams": "rayserve_sarathi.request"}


def __getattr__(name: str) -> Any:
    # Late, so that the pure parts (scheduling, kv, simulation) import without torch.
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_EXPORTS[name]), name)
