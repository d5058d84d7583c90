"""How messages travel between the scheduler and the stage actors: the interface of the transports."""

from collections.abc import Mapping
from typing import Protocol

from rayserve_sarathi.step import StepInput, StepOutput

TRANSPORTS: Mapping[str, str] = {
    "compiled_graph": "rayserve_sarathi.actors.compiled_graph:CompiledGraphTransport",
    "socket": "rayserve_sarathi.actors.socket_transport:SocketTransport",
}


class Transport(Protocol):
    """A way through the stages of a `StageGroup`, until it is closed."""

    async def open(self, epoch: int) -> None:
        """Join the stages, for steps of this epoch; raises PipelineFaultError."""

    async def submit(self, step: StepInput) -> None:
        """Send a step to the first stage; raises PipelineFaultError."""

    async def receive(self) -> StepOutput:
        """Wait for the oldest step that was submitted and not received; raises PipelineFaultError."""

    async def close(self) -> None:
        """Part the stages, also those that are dead or hang; their actors live on."""
