"""Embedding and head, each rank having some rows of both.

Dimensions: T tokens in the step; n rows whose logits are wanted; D hidden size; V vocabulary; R rows of the rank.
"""

import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.models.parallel import TensorParallel


class Embedding:
    """Hidden states of token ids.

    Args:
        weight: [R, D].
        first: Token id of its first row.
        tp: Ranks that have the other rows.
    """

    def __init__(self, weight: Tensor, *, first: int, tp: TensorParallel) -> None:
        self.weight = weight
        self._first = first
        self._tp = tp

    def __call__(self, token_ids: Tensor) -> Tensor:
        """Return [T, D] for token ids, [T] int64."""
        if self._tp.tp_size == 1:
            return F.embedding(token_ids, self.weight)
        rows = token_ids - self._first
        is_elsewhere = (rows < 0) | (rows >= len(self.weight))
        hidden = F.embedding(rows.masked_fill(is_elsewhere, 0), self.weight)
        return self._tp.all_reduce(hidden.masked_fill_(is_elsewhere[:, None], 0))


class Head:
    """Logits of hidden states.

    Args:
        weight: [R, D].
        vocab_size: V; rows beyond it are padding.
        tp: Ranks that have the other rows.
    """

    def __init__(self, weight: Tensor, *, vocab_size: int, tp: TensorParallel) -> None:
        self.linear = Linear(weight)
        self._vocab_size = vocab_size
        self._tp = tp

    def __call__(self, hidden: Tensor) -> Tensor:
        """Return [n, V], contiguous, for hidden states after the final norm, [n, D]."""
        return self._tp.all_gather(self.linear(hidden))[:, : self._vocab_size].contiguous()
