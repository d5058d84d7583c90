"""A pipeline of stage actors: steps go by its transport, and what fails is found, named and replaced."""

import asyncio
import logging
import time
from collections.abc import Collection
from typing import NoReturn

from rayserve_sarathi.actors.stage_group import StageGroup
from rayserve_sarathi.actors.transport import Transport
from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.step import StepInput, StepOutput

logger = logging.getLogger(__name__)

_HEARTBEAT_S = 1.0
"""While a step takes longer than this, the stages are asked for a sign of life as often."""
_IDLE_HEARTBEAT_S = 5.0
"""The same while there is no step."""


class ActorPipeline:
    """See `execution.pipeline.Pipeline`.

    Args:
        stages: Started; taken over.
        transport: Not yet open; taken over.
        step_timeout_s: A step that takes longer means that a stage hangs, though all answer.
    """

    def __init__(self, stages: StageGroup, transport: Transport, *, step_timeout_s: float) -> None:
        self._stages = stages
        self._transport = transport
        self._step_timeout_s = step_timeout_s
        self._epoch = 0
        self._num_inside = 0
        self._oldest_since_s = 0.0
        """Since when the oldest step inside is the oldest."""

    async def open(self) -> None:
        """Join the stages; before the first step."""
        await self._transport.open(self._epoch)

    async def submit(self, step: StepInput) -> None:
        """Send the step to the first stage."""
        if not self._num_inside:
            self._oldest_since_s = time.monotonic()
        self._num_inside += 1
        try:
            await self._transport.submit(step)
        except PipelineFaultError as fault:
            await self._explain(fault)

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside, watching the stages meanwhile."""
        waiting = asyncio.ensure_future(self._transport.receive())
        try:
            if not (await asyncio.wait((waiting,), timeout=self._heartbeat_s))[0]:
                await self._watch(waiting)
            output = waiting.result()
        except PipelineFaultError as fault:
            await self._explain(fault)
        finally:
            waiting.cancel()
        self._num_inside -= 1
        self._oldest_since_s = time.monotonic()
        return output

    async def rebuild(self, broken: Collection[int]) -> None:
        """Replace the stages that are `broken` or silent, and those that ranks share; then join all of them anew.

        Ranks of a stage part each within the step that it is in, and some have left their group because of a fault
        elsewhere: a stage of several can compute nothing more, though all its ranks answer. It costs no time beside
        the stages that are replaced anyway, as all load at once, and no KV, as all of it is computed again.
        """
        # Before the others part: one that is stopped would be waited for then, and when it is asked for a sign of life.
        self._stages.end(broken)
        await self._transport.close()
        self._num_inside = 0
        self._epoch += 1
        silent = await self._stages.find_silent()
        shared = {stage for stage, ranks in enumerate(self._stages.ranks) if len(ranks) > 1}
        replaced = sorted({*broken, *silent, *shared})
        begin_s = time.monotonic()
        await self._stages.replace(replaced)
        await self._transport.open(self._epoch)
        logger.info("replaced stages %s in %.1f s", replaced, time.monotonic() - begin_s)

    async def check_health(self) -> None:
        """Ask every stage for a sign of life."""
        await self._stages.check_health()

    async def pids(self) -> list[int]:
        """Return the processes of all ranks, stage by stage."""
        return await self._stages.pids()

    async def close(self) -> None:
        """Part the stages and end their actors."""
        await self._transport.close()
        self._stages.end(range(len(self._stages.ranks)))

    @property
    def _heartbeat_s(self) -> float:
        return _HEARTBEAT_S if self._num_inside else _IDLE_HEARTBEAT_S

    async def _explain(self, fault: PipelineFaultError) -> NoReturn:
        """Raise a fault that names the stages behind it, where one says only that messages do not get through."""
        if not fault.stages:
            try:
                await self._stages.check_health()
            except PipelineFaultError as named:
                raise named from fault
        raise fault

    async def _watch(self, waiting: "asyncio.Future[StepOutput]") -> None:
        """Watch the stages until a step has come.

        No transport always notices that an actor has died, and none that one is stopped.
        """
        while not waiting.done():
            asking = asyncio.ensure_future(self._stages.check_health())
            try:
                await asyncio.wait((waiting, asking), return_when=asyncio.FIRST_COMPLETED)
                if waiting.done():
                    return
                asking.result()
            finally:
                asking.cancel()
            if self._num_inside and time.monotonic() - self._oldest_since_s > self._step_timeout_s:
                message = f"a step took longer than step_timeout_s={self._step_timeout_s:g}; all stages answer"
                raise PipelineFaultError(message, reason="hung", stages=range(len(self._stages.ranks)))
            await asyncio.wait((waiting,), timeout=self._heartbeat_s)
