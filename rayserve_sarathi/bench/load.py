"""When requests are sent: at times that do not depend on the server (open loop), or as its answers come (closed loop).

Only an open loop shows an overload: clients of a closed one wait for the server, and so send less when it is slow.
"""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, field

from rayserve_sarathi.bench.outcome import Outcome

Send = Callable[[float], Awaitable[Outcome]]
"""Sends one request, which was due at a time of `time.perf_counter`, and waits for its end."""
Prepare = Callable[[int], Send]
"""Makes the body of the request of an index, so that it is ready when it is due."""


@dataclass(eq=False)
class Tally:
    """How far a load has come; written by the loop, read by whoever shows it."""

    num_requests: int
    start_s: float = field(default_factory=time.perf_counter)
    num_sent: int = 0
    outcomes: list[Outcome] = field(default_factory=list)
    """In the order in which they ended."""
    note: Callable[[Outcome], None] = lambda _: None
    """Called with each outcome."""

    @property
    def num_open(self) -> int:
        """Requests that are sent and have not ended."""
        return self.num_sent - len(self.outcomes)

    @property
    def duration_s(self) -> float:
        """From the first request to the last end so far; there must be one."""
        return max(outcome.end_s for outcome in self.outcomes) - min(outcome.sent_s for outcome in self.outcomes)

    @property
    def num_failed(self) -> int:
        """Requests that ended without a complete answer."""
        return sum(outcome.failure is not None for outcome in self.outcomes)


async def run_open_loop(prepare: Prepare, arrivals_s: Sequence[float], tally: Tally) -> None:
    """Send each request at its time, whatever became of the others, and wait for their ends.

    Args:
        prepare: See `Prepare`.
        arrivals_s: When to send each, in seconds from now; does not decrease.
        tally: Gets the outcomes.
    """
    start_s = time.perf_counter()
    async with asyncio.TaskGroup() as group:
        for index, arrival_s in enumerate(arrivals_s):
            send = prepare(index)
            await asyncio.sleep(start_s + arrival_s - time.perf_counter())
            group.create_task(_send(send, start_s + arrival_s, tally))


async def run_closed_loop(prepare: Prepare, *, num_clients: int, tally: Tally) -> None:
    """Let each client send a request, wait for its end, and send the next.

    A client that is refused waits for as long as the server asks for (`Retry-After`) before its next request.

    Args:
        prepare: See `Prepare`.
        num_clients: How many requests are open at a time.
        tally: Gets the outcomes; its `num_requests` are sent in all.
    """
    indices = iter(range(tally.num_requests))

    async def be_client() -> None:
        for index in indices:
            outcome = await _send(prepare(index), time.perf_counter(), tally)
            if outcome.failure is not None and outcome.failure.retry_after_s is not None:
                await asyncio.sleep(outcome.failure.retry_after_s)

    async with asyncio.TaskGroup() as group:
        for _ in range(num_clients):
            group.create_task(be_client())


async def _send(send: Send, due_s: float, tally: Tally) -> Outcome:
    tally.num_sent += 1
    outcome = await send(due_s)
    tally.outcomes.append(outcome)
    tally.note(outcome)
    return outcome
