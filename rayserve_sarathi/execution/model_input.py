"""Turn a `StepInput` into tensors, without a Python loop over tokens.

Dimensions: T tokens in the step; S requests that sample a token.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout
from rayserve_sarathi.kernels.gpu import on_device
from rayserve_sarathi.step import PendingTokens, StepInput


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInput:
    """What the layers of a stage need.

    Args:
        token_ids: [T] int64.
        metadata: Attention's view of the step.
    """

    token_ids: Tensor
    metadata: AttentionMetadata


def build_model_input(
    step: StepInput, *, block_size: int, device: torch.device, sampled: Tensor | None = None
) -> ModelInput:
    """Copy the step to the device.

    Args:
        step: What to compute.
        block_size: Tokens per KV block.
        device: Of the stage.
        sampled: Tokens that the step before sampled, [S] of any integers; only if tokens of the step are pending.
    """
    token_ids = on_device(torch.tensor(step.token_ids, dtype=torch.int64), device)
    if step.pending is not None:
        put_pending(token_ids, step.pending, sampled)
    return ModelInput(
        token_ids=token_ids,
        metadata=AttentionMetadata.of(step_layout(step, block_size=block_size), device),
    )


def put_pending(token_ids: Tensor, pending: PendingTokens, sampled: Tensor | None) -> None:
    """Put tokens where they are pending, without waiting for a GPU.

    Args:
        token_ids: Of the step, [T].
        pending: Which are wanted.
        sampled: Tokens of the step before, [S]; None if it failed, and with it the requests that lack a token.
    """
    positions, samples = (
        on_device(torch.tensor(each, dtype=torch.int64), token_ids.device)
        for each in (pending.positions, pending.samples)
    )
    if sampled is None:
        token_ids.index_fill_(0, positions, 0)
    else:
        token_ids.index_copy_(0, positions, sampled[samples].to(token_ids.dtype))


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
