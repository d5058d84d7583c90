"""The transport by sockets of our own between the actors: nothing polls, and on CPUs it costs less than a graph.

On GPUs only what describes a step goes over the sockets; activations go by NCCL, rank to rank.
"""

import asyncio
import logging
from typing import Any

import ray
from ray.exceptions import RayError

from rayserve_sarathi.actors.stage_group import StageGroup, reason_of
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.execution.handshake import make_secret
from rayserve_sarathi.execution.socket_pipeline import SocketEndpoint, open_endpoint
from rayserve_sarathi.execution.sockets import Address, Listener
from rayserve_sarathi.step import StepInput, StepOutput

logger = logging.getLogger(__name__)

_JOIN_TIMEOUT_S = 30.0
_PART_TIMEOUT_S = 2.0


class SocketTransport:
    """See `Transport`.

    Args:
        stages: Whose they are.
        config: The engine's.
        max_steps_inside: Not needed: sockets take what comes.
        max_message_bytes: Not needed likewise.
    """

    def __init__(
        self, stages: StageGroup, config: EngineConfig, *, max_steps_inside: int, max_message_bytes: int
    ) -> None:
        self._stages = stages
        self._config = config
        self._endpoint: SocketEndpoint | None = None

    async def open(self, epoch: int) -> None:
        """Let every rank listen, connect each to the same rank of the next stage, and the ends to the scheduler."""
        secret = make_secret()
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's annotation is missing
        listener = Listener(host, secret=secret)
        try:
            addresses = await self._listen(secret, epoch)
            connects: list[tuple[Any, Address]] = [(self._stages.ranks[-1][0], listener.address)]
            for ranks, following in zip(self._stages.ranks, addresses[1:], strict=False):
                connects += zip(ranks, following, strict=True)
            await _all([_control(rank.connect).remote(address) for rank, address in connects])
            for ranks in self._stages.ranks:
                for rank in ranks:
                    rank.run_sockets.remote()
        except (RayError, TimeoutError) as error:
            listener.close()
            message = f"the stages could not be joined ({reason_of(error)})"
            raise PipelineFaultError(message, reason="died") from error
        except asyncio.CancelledError:
            listener.close()
            raise
        self._endpoint = await open_endpoint(
            listener, addresses[0], secret=secret, epoch=epoch, timeout_s=_JOIN_TIMEOUT_S
        )

    async def submit(self, step: StepInput) -> None:
        """Send the step to all ranks of the first stage."""
        await self._opened.submit(step)

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside."""
        return await self._opened.receive()

    async def close(self) -> None:
        """Close the connections, and have the stages close theirs."""
        endpoint, self._endpoint = self._endpoint, None
        if endpoint is not None:
            await endpoint.close()
        calls = [_control(rank.part).remote() for ranks in self._stages.ranks for rank in ranks]
        await asyncio.gather(*(_quietly(call) for call in calls))

    async def _listen(self, secret: bytes, epoch: int) -> list[list[Address]]:
        """Have every rank listen; return the addresses, stage by stage."""
        num_ranks = self._config.tensor_parallel_size
        links: list[list[Address | None]] = [[None] * num_ranks for _ in range(len(self._stages.ranks) + 1)]
        if self._config.device == "cuda":
            for stage, ranks in enumerate(self._stages.ranks[1:], 1):
                links[stage] = await _all([_control(rank.open_meeting).remote() for rank in ranks])
        calls = [
            [
                _control(rank.listen).remote(secret, epoch, receive_at=receive_at, send_at=send_at)
                for rank, receive_at, send_at in zip(ranks, links[stage], links[stage + 1], strict=True)
            ]
            for stage, ranks in enumerate(self._stages.ranks)
        ]
        # All at once: the two ends of a link wait for each other.
        await _all([call for of_stage in calls for call in of_stage])
        return [await _all(of_stage) for of_stage in calls]

    @property
    def _opened(self) -> SocketEndpoint:
        if self._endpoint is None:
            raise PipelineFaultError("the pipeline's sockets are closed", reason="died")
        return self._endpoint


def _control(method: Any) -> Any:
    return method.options(concurrency_group="control")


async def _all(calls: list[Any]) -> list[Any]:
    return list(await asyncio.wait_for(asyncio.gather(*calls), _JOIN_TIMEOUT_S))


async def _quietly(call: Any) -> None:
    """Wait for a call whose actor may be dead or stopped, in which case there is nothing to part."""
    try:
        await asyncio.wait_for(call, _PART_TIMEOUT_S)
    except (RayError, TimeoutError) as error:
        logger.info("a stage did not part (%s)", type(error).__name__)
