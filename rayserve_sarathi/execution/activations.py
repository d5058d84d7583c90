"""Ways for hidden states to get from one stage to the next: in the message itself, or beside it.

Dimensions: T tokens in the step; D hidden size.
"""

import math
from collections import deque
from collections.abc import Callable
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.distributed_c10d import Store

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.codec import MAX_BODY_BYTES, ByteArray
from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.execution.wire import Activation, RelayedStep
from rayserve_sarathi.models.process_group import Group, open_process_group

Shape = tuple[int, ...]
_DTYPES = {
    "float64": torch.float64,
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float8_e4m3fn": torch.float8_e4m3fn,
    "float8_e5m2": torch.float8_e5m2,
}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_SENDING = 8


class ActivationPath(Protocol):
    """One link between two stages. Both ends take the same tensors in the same order."""

    def send(self, hidden: Tensor) -> ByteArray | None:
        """Begin to send hidden states, [T, D]; return the bytes that the message has to carry, None for none.

        Called by the thread that computed them. They must not change afterwards.
        """

    def receive(self, shape: Shape, dtype: torch.dtype, data: ByteArray | None) -> Callable[[], Tensor]:
        """Begin to receive hidden states of this shape and dtype.

        Called when their message arrives, with the bytes in it.

        Returns:
            What waits for them and returns them, [T, D]; for the thread that computes with them.
        """

    def close(self) -> None:
        """End it, whatever is on the way."""


class InMessage:
    """In the message, through host memory: for stages on CPUs."""

    def send(self, hidden: Tensor) -> ByteArray | None:
        """Return the bytes; a view if the tensor is contiguous and in host memory."""
        data: ByteArray = hidden.detach().to("cpu").reshape(-1).view(torch.uint8).numpy()
        return data

    def receive(self, shape: Shape, dtype: torch.dtype, data: ByteArray | None) -> Callable[[], Tensor]:
        """Return a view of `data`."""
        num_bytes = math.prod(shape) * dtype.itemsize
        if data is None or len(data) != num_bytes:
            raise WireError(
                f"hidden states of shape {shape} and {dtype} have {num_bytes} bytes, "
                f"got {None if data is None else len(data)}"
            )
        hidden = torch.from_numpy(data).view(dtype).reshape(shape)
        return lambda: hidden

    def close(self) -> None:
        """Nothing is on the way."""


class ByProcessGroup:
    """Beside the message, from device to device: for stages on GPUs.

    NCCL begins a transfer when the work that the calling thread's stream has at that time is done, so `send` is for
    the thread that computes; and a received tensor is awaited by that thread's stream, not by the host.

    Args:
        group: Of two ranks that nothing else uses, and no other thread of this process in the same direction.
        peer: The other one's rank.
        device: Where tensors are received.
    """

    def __init__(self, group: Group, *, peer: int, device: torch.device) -> None:
        self._group: Group | None = group  # None once it is closed
        self._peer = peer
        self._device = device
        self._sending: deque[tuple[dist.Work, Tensor]] = deque()

    def send(self, hidden: Tensor) -> ByteArray | None:
        """Send from the device's memory."""
        hidden = hidden.detach().contiguous()
        try:
            self._sending.append((self._open_group().send([hidden], self._peer, 0), hidden))
            if len(self._sending) > _MAX_SENDING:
                # Waiting for the newest would keep the device from computing meanwhile; so old a one has long arrived.
                self._sending.popleft()[0].wait()
        except (RuntimeError, IndexError) as error:  # the latter if it is closed just now
            raise _fault(error) from error
        return None

    def receive(self, shape: Shape, dtype: torch.dtype, data: ByteArray | None) -> Callable[[], Tensor]:
        """Receive into new memory of the device."""
        if data is not None:
            raise WireError("hidden states came in a message, but are to come by a process group")
        try:
            hidden = torch.empty(shape, dtype=dtype, device=self._device)
            work = self._open_group().recv([hidden], self._peer, 0)
        except RuntimeError as error:
            raise _fault(error) from error

        def wait() -> Tensor:
            try:
                work.wait()
            except RuntimeError as error:
                raise _fault(error) from error
            return hidden

        return wait

    def close(self) -> None:
        """Abort what is on the way, on which the device would wait for ever, and leave the group.

        Gloo cannot abort: who waits there is told when the other end leaves.
        """
        group, self._group = self._group, None
        self._sending.clear()
        if group is not None:
            group.abort()

    def _open_group(self) -> Group:
        if self._group is None:
            raise PipelineFaultError("the process group of a link between stages was closed", reason="died")
        return self._group


def open_group(
    store: Store, *, is_sender: bool, meeting_timeout_s: float, timeout_s: float, device: torch.device
) -> ByProcessGroup:
    """Join the two stages of a link by a process group of their own, and send a first tensor through it.

    Without that, NCCL would join them at the first step, which the receiver learns of only after the sender has sent.

    Args:
        store: Of these two alone, for them to find each other.
        is_sender: Whether this is the end that sends.
        meeting_timeout_s: Longest to wait for the other end.
        timeout_s: Longest time for a tensor.
        device: On `cuda` by NCCL, on `cpu` by gloo.

    Raises:
        PipelineFaultError: The other end was not reached.
    """
    rank = 0 if is_sender else 1
    try:
        group = open_process_group(
            store, rank=rank, size=2, meeting_timeout_s=meeting_timeout_s, timeout_s=timeout_s, device=device
        )
        path = ByProcessGroup(group, peer=1 - rank, device=device)
        probe = torch.zeros(1, 1, device=device)
        if is_sender:
            path.send(probe)
        else:
            path.receive((1, 1), probe.dtype, None)().cpu()
    except RuntimeError as error:
        raise _fault(error) from error
    return path


def _fault(error: Exception) -> PipelineFaultError:
    reason = str(error).partition("\n")[0]
    return PipelineFaultError(f"the link between two stages is broken: {reason}", reason="died")


def pack(message: StageMessage, path: ActivationPath) -> RelayedStep:
    """Begin to send the hidden states of a message; return what goes over the socket."""
    hidden = message.hidden
    return RelayedStep(
        step=message.step,
        hidden=None
        if hidden is None
        else Activation(shape=tuple(hidden.shape), dtype=_NAMES[hidden.dtype], data=path.send(hidden)),
        timings=message.timings,
        fault=message.fault,
    )


def unpack(relayed: RelayedStep, path: ActivationPath) -> tuple[StageMessage, Callable[[], Tensor] | None]:
    """Begin to receive the hidden states of a message.

    Returns:
        The message without them, and what waits for them; None if there are none.

    Raises:
        WireError: They can be none.
    """
    message = StageMessage(step=relayed.step, timings=relayed.timings, fault=relayed.fault)
    if relayed.hidden is None:
        return message, None
    shape, dtype = relayed.hidden.shape, _DTYPES.get(relayed.hidden.dtype)
    if dtype is None or len(shape) != 2 or not all(0 <= size < 2**31 for size in shape):
        raise WireError(
            f"hidden states are [T, D] of one of {sorted(_DTYPES)}, got {shape} of {relayed.hidden.dtype!r}"
        )
    if math.prod(shape) * dtype.itemsize > MAX_BODY_BYTES:
        raise WireError(f"hidden states have at most {MAX_BODY_BYTES} bytes, got {shape} of {dtype}")
    return message, path.receive(shape, dtype, relayed.hidden.data)
