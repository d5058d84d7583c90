"""The MLP of a layer, or a rank's part of its intermediate size.

Dimensions: T tokens in the step; D hidden size; E experts; C experts chosen for each token.
"""

from typing import Protocol

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.silu_mul import silu_mul
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.parameters import Weights


class Mlp(Protocol):
    """What follows attention in a layer."""

    def __call__(self, x: Tensor) -> Tensor:
        """Return what the rank contributes, [T, D], for x, [T, D]: the sum over all ranks is the MLP's output."""


class DenseMlp:
    """Two matrices with an activation between: the SwiGLU of Llama, or a GELU, the exact one and not its tanh form."""

    def __init__(self, config: DecoderConfig, weights: Weights, prefix: str) -> None:
        self.is_gated = config.mlp != "gelu"
        self._activate = F.gelu if config.mlp == "gelu" else silu_mul
        self.up = Linear(weights.pop(f"{prefix}up"), weights.pop(f"{prefix}up_bias", None))
        self.down = Linear(weights.pop(f"{prefix}down"), weights.pop(f"{prefix}down_bias", None))

    def __call__(self, x: Tensor) -> Tensor:
        """See `Mlp`."""
        return self.down(self._activate(self.up(x)))


class Experts:
    """Gated MLPs of which a router chooses some for each token (Jiang et al., 2024).

    Each rank has a part of every expert, so all ranks route alike and their outputs add up as those of one MLP.
    """

    def __init__(self, config: DecoderConfig, weights: Weights, prefix: str) -> None:
        self._num_chosen = config.num_experts_per_tok
        self._router = Linear(weights.pop(f"{prefix}router"))
        self._experts = [
            DenseMlp(config, weights, f"{prefix}experts.{expert}.") for expert in range(config.num_local_experts)
        ]

    def __call__(self, x: Tensor) -> Tensor:
        """See `Mlp`."""
        probabilities = F.softmax(self._router(x), dim=-1, dtype=torch.float32)
        weights, chosen = probabilities.topk(self._num_chosen, dim=-1)  # [T, C] each
        weights = weights / weights.sum(dim=-1, keepdim=True)

        # The T * C pairs of token and expert, ordered by expert: each expert computes all its tokens at once.
        order = chosen.flatten().argsort(stable=True)
        counts = chosen.flatten().bincount(minlength=len(self._experts)).tolist()
        groups = torch.split(x[order // self._num_chosen], counts)
        outputs = [expert(group) for expert, group in zip(self._experts, groups, strict=True) if len(group)]
        # Back in the order of the tokens and summed there: adding up by index is not the same in each run on a GPU.
        pairs = torch.empty((len(order), x.shape[1]), dtype=x.dtype, device=x.device)
        pairs[order] = torch.cat(outputs)
        return (pairs.view(*chosen.shape, -1) * weights[..., None]).sum(dim=1).to(x.dtype)


def take_mlp(config: DecoderConfig, weights: Weights, prefix: str) -> Mlp:
    """Take the MLP whose names begin with a prefix out of the weights."""
    return (Experts if config.mlp == "experts" else DenseMlp)(config, weights, prefix)
