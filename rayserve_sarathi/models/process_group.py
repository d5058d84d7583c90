"""Process groups of their own: of the ranks of a stage, and of the two ends of a link between stages.

A group is an object and not torch's global default, so that its members can be threads of one process as well as
actors, and an actor can be in several. They find each other through a store that all of them have.
"""

from datetime import timedelta
from typing import Protocol, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's __all__
from torch.distributed.distributed_c10d import Store

from rayserve_sarathi.errors import EngineDeadError


class Group(Protocol):
    """What is used of torch's Gloo and NCCL groups, whose stubs lack it."""

    def allreduce(self, tensors: list[Tensor], /) -> dist.Work:
        """Sum each tensor over the ranks, in place."""

    def allgather(self, output_tensors: list[list[Tensor]], input_tensors: list[Tensor], /) -> dist.Work:
        """Copy each tensor of all ranks into a list of as many."""

    def send(self, tensors: list[Tensor], dst_rank: int, tag: int, /) -> dist.Work:
        """Begin to send."""

    def recv(self, tensors: list[Tensor], src_rank: int, tag: int, /) -> dist.Work:
        """Begin to receive, into the tensors."""

    def abort(self) -> None:
        """End what is on the way, with an error for who waits for it. Gloo's does nothing."""


def open_store(host: str, *, timeout_s: float) -> TCPStore:
    """Open a store at a free port of this machine, which is its `port`; it is there as long as the object is.

    Args:
        host: This machine's address.
        timeout_s: Longest to wait for a key.
    """
    return TCPStore(host, 0, is_master=True, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)


def find_store(host: str, port: int, *, timeout_s: float) -> TCPStore:
    """Connect to a store of another process.

    Args:
        host: Of the one that opened it.
        port: Its port.
        timeout_s: Longest to wait for the connection, and for a key.

    Raises:
        EngineDeadError: It is not there.
    """
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=timeout_s), wait_for_workers=False)
    except RuntimeError as error:
        reason = str(error).partition("\n")[0]
        raise EngineDeadError(f"there is nobody to meet at {host}:{port}: {reason}") from error


def open_process_group(
    store: Store, *, rank: int, size: int, meeting_timeout_s: float, timeout_s: float, device: torch.device
) -> Group:
    """Join a group. All members call this, each in a thread or process of its own.

    NCCL connects them at the first collective, and anew at the first `send`: whoever calls this sends something at
    once, so that it does not happen in a step, and the memory that it takes is not given to the KV cache.

    Args:
        store: Of this group alone.
        rank: Which member this is.
        size: How many there are.
        meeting_timeout_s: Longest to wait for the others.
        timeout_s: Longest that whatever is sent may take.
        device: That of the tensors: NCCL on `cuda`, Gloo on `cpu`.

    Raises:
        RuntimeError: The others did not come in time.
    """
    meeting_timeout, timeout = timedelta(seconds=meeting_timeout_s), timedelta(seconds=timeout_s)
    store.set_timeout(meeting_timeout)
    store.set(f"member {rank}", "")
    store.wait([f"member {other}" for other in range(size)], meeting_timeout)
    if device.type == "cuda":
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = timeout
        return cast(Group, dist.ProcessGroupNCCL(store, rank, size, options))
    return cast(Group, dist.ProcessGroupGloo(store, rank, size, timeout))
