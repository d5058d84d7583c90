"""How steps travel through stages: the interface that every transport has."""

from collections.abc import Collection
from typing import Protocol

from rayserve_sarathi.step import StepInput, StepOutput


class Pipeline(Protocol):
    """Stages in a row. Steps go in and come out in the same order; several may be inside."""

    async def submit(self, step: StepInput) -> None:
        """Send a step to the first stage; raises what `receive` does."""

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside; while there is none, for the next one.

        Raises:
            PipelineFaultError: A stage died, does not answer, or took longer than `step_timeout_s`. Nothing more comes
                out until `rebuild`.
        """

    async def rebuild(self, broken: Collection[int]) -> None:
        """Replace the stages that are `broken` and all others that cannot go on. What was inside never comes out.

        Raises:
            PipelineFaultError: It did not come up; another attempt may succeed.
            EngineDeadError: It cannot be rebuilt.
        """

    async def check_health(self) -> None:
        """Return if all stages answer.

        Raises:
            PipelineFaultError: One does not; the message says which.
        """

    async def close(self) -> None:
        """Stop the stages and free what they hold."""
