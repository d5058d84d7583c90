"""What a scheduler has for each ingress, until the ingress reads it, and which requests each ingress still claims."""

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable

from rayserve_sarathi.request import RequestOutput
from rayserve_sarathi.routing import Call

_LINGER_S = 1.0
"""A stream of outputs ends after this long without an open request, so that a draining replica has no calls left.
With open requests but no output, it shows that it is alive as often."""
_SILENCE_S = 30.0
"""An ingress that has neither read nor claimed anything for this long is dead."""


class _Outbox:
    def __init__(self, now_s: float) -> None:
        self.last_call = 0
        self.outputs: list[RequestOutput] = []
        self.filled = asyncio.Event()
        self.open_ids: set[str] = set()
        self.unclaimed_ids: set[str] = set()
        self.last_heard_s = now_s
        self.num_readers = 0


class Outboxes:
    """One box for each ingress that has sent requests.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._boxes: dict[str, _Outbox] = {}
        self._box_of: dict[str, _Outbox] = {}

    def open(self, call: Call, request_id: str) -> None:
        """Begin to collect the outputs of a request that came by a call of an ingress."""
        box = self._boxes.get(call.ingress)
        if box is None:
            box = self._boxes[call.ingress] = _Outbox(self._clock())
        box.last_call = max(box.last_call, call.number)
        box.open_ids.add(request_id)
        self._box_of[request_id] = box

    def close(self, request_id: str) -> None:
        """Stop collecting them; a request that is not open is left alone."""
        box = self._box_of.pop(request_id, None)
        if box is not None:
            box.open_ids.discard(request_id)
            box.unclaimed_ids.discard(request_id)

    def last_calls(self) -> dict[str, int]:
        """Return the number of the last call of each ingress that is not silent."""
        return {ingress: box.last_call for ingress, box in self._boxes.items()}

    def deliver(self, outputs: list[RequestOutput]) -> None:
        """Put each output of a step into the box of its ingress."""
        for output in outputs:
            box = self._box_of.get(output.request_id)
            if box is None:
                continue
            box.outputs.append(output)
            box.filled.set()
            if output.finish_reason is not None:
                self.close(output.request_id)

    async def read(self, ingress: str) -> AsyncIterator[list[RequestOutput]]:
        """Yield all that has come since the last time, as soon as there is any, or an empty list as a sign of life."""
        box = self._boxes.get(ingress)
        if box is None:
            return
        box.num_readers += 1
        reader = box.num_readers
        while True:
            try:
                async with asyncio.timeout(_LINGER_S):
                    await box.filled.wait()
            except TimeoutError:
                if not box.open_ids and not box.outputs:
                    return
            if reader != box.num_readers:
                return  # the ingress reads anew; what comes now is for that stream
            box.last_heard_s = self._clock()  # of a replica that drains it hears no more claims, only that it is read
            box.filled.clear()
            outputs, box.outputs = box.outputs, []
            yield outputs

    def claim(self, ingress: str, request_ids: Iterable[str]) -> set[str]:
        """Note what an ingress still has open.

        Returns:
            Open requests that neither this claim nor the one before it names. Once is not enough, as a request may be
            on its way here while a claim is.
        """
        box = self._boxes.get(ingress)
        if box is None:
            return set()
        box.last_heard_s = self._clock()
        unclaimed = box.open_ids.difference(request_ids)
        abandoned = unclaimed & box.unclaimed_ids
        box.unclaimed_ids = unclaimed - abandoned
        return abandoned

    def expire(self) -> set[str]:
        """Drop the boxes of ingresses that have fallen silent; return their open requests."""
        silent = [name for name, box in self._boxes.items() if self._clock() - box.last_heard_s > _SILENCE_S]
        return set().union(*(self._boxes.pop(name).open_ids for name in silent))
