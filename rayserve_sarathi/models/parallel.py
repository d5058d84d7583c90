"""The collectives of the tensor-parallel ranks of a stage, over a group of their own."""

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.models.process_group import Group, open_process_group


class TensorParallel:
    """One rank among those that share each layer of a stage. All ranks call the same collectives in the same order.

    On a CPU a collective fails if another rank has left. On a GPU it is begun, and the device waits for the others, for
    ever if one has left: NCCL tells nobody. There a rank that leaves must end its process, which others can see.

    Args:
        tp_rank: Which, from 0.
        tp_size: Of how many; with one, nothing is sent.
        group: Joins them; None for a single rank.
    """

    def __init__(self, *, tp_rank: int = 0, tp_size: int = 1, group: Group | None = None) -> None:
        assert 0 <= tp_rank < tp_size and (group is None) == (tp_size == 1), (tp_rank, tp_size, group)
        self.tp_rank = tp_rank
        self.tp_size = tp_size
        self._group = group

    def all_reduce(self, x: Tensor) -> Tensor:
        """Return the sum of x over all ranks, the same bits on each; x, contiguous, is overwritten.

        Raises:
            EngineDeadError: This rank has left the group or, on a CPU, another one has.
        """
        if self.tp_size > 1:
            self._run(lambda group: group.allreduce([x]))
        return x

    def all_gather(self, x: Tensor) -> Tensor:
        """Return the x, [..., I], of all ranks side by side, [..., tp_size * I].

        Raises:
            EngineDeadError: As for `all_reduce`.
        """
        if self.tp_size == 1:
            return x
        parts = [torch.empty_like(x) for _ in range(self.tp_size)]
        self._run(lambda group: group.allgather([parts], [x]))
        return torch.cat(parts, dim=-1)

    def close(self) -> None:
        """Leave the group: over Gloo, what other ranks wait for, or will, fails at once and not after the timeout."""
        group, self._group = self._group, None
        if group is not None:
            group.abort()

    def _run(self, begin: Callable[[Group], dist.Work]) -> None:
        if self._group is None:
            raise EngineDeadError(f"tensor-parallel rank {self.tp_rank} has left its group")
        try:
            begin(self._group).wait()
        except RuntimeError as error:
            self.close()
            reason = str(error).partition("\n")[0]
            raise EngineDeadError(f"tensor-parallel rank {self.tp_rank} lost the others: {reason}") from error


SINGLE_RANK = TensorParallel()
"""A stage whose layers are not split."""


def join(
    store: Store, *, tp_rank: int, tp_size: int, meeting_timeout_s: float, timeout_s: float, device: torch.device
) -> TensorParallel:
    """Meet the other ranks of a stage. All of them call this, each in a thread or process of its own.

    Args:
        store: Of these ranks alone.
        tp_rank: Which rank this is.
        tp_size: How many there are.
        meeting_timeout_s: Longest to wait for the others.
        timeout_s: Longest that a collective may take.
        device: That of the tensors: NCCL on `cuda`, Gloo on `cpu`.

    Raises:
        EngineDeadError: The others did not come in time.
    """
    if tp_size == 1:
        return SINGLE_RANK
    try:
        group = open_process_group(
            store, rank=tp_rank, size=tp_size, meeting_timeout_s=meeting_timeout_s, timeout_s=timeout_s, device=device
        )
        tp = TensorParallel(tp_rank=tp_rank, tp_size=tp_size, group=group)
        tp.all_reduce(torch.zeros(1, device=device)).cpu()
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise EngineDeadError(
            f"tensor-parallel rank {tp_rank} did not meet the others within {meeting_timeout_s:.0f} s: {reason}"
        ) from error
    return tp
