"""Turn a `StepInput` into tensors, without a Python loop over tokens.

Dimensions: T tokens in the step; S requests that sample a token.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout
from rayserve_sarathi.step import StepInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """What the layers of a stage need.

    Args:
        token_ids: [T] int64.
        metadata: Attention's view of the step.
    """

    token_ids: Tensor
    metadata: AttentionMetadata


def build_model_input(step: StepInput, *, block_size: int, device: torch.device) -> ModelInput:
    """Copy the step to the device."""
    return ModelInput(
        token_ids=torch.tensor(step.token_ids, dtype=torch.int64, device=device),
        metadata=AttentionMetadata.of(step_layout(step, block_size=block_size), device),
    )


def step_layout(step: StepInput, *, block_size: int) -> StepLayout:
    """Return attention's view of a step, on the host."""
    return StepLayout(
        query_lens=step.query_lens,
        context_lens=step.context_lens,
        block_tables=step.block_tables,
        num_blocks=step.num_blocks,
        block_size=block_size,
    )


def first_tokens(step: StepInput) -> npt.NDArray[np.int64]:
    """Return where in the step each request's chunk begins, and T, [R + 1]."""
    return np.concatenate(([0], np.cumsum(step.query_lens, dtype=np.int64)))


def sampled_tokens(step: StepInput) -> npt.NDArray[np.int64]:
    """Return where in the step the last token of each sampling request is, [S]."""
    return first_tokens(step)[1:][step.sample_requests] - 1
