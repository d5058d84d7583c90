"""How steps travel through stages: the interface that every transport has."""

from typing import Protocol

from rayserve_sarathi.step import StepInput, StepOutput


class Pipeline(Protocol):
    """Stages in a row. Steps go in and come out in the same order; several may be inside."""

    async def submit(self, step: StepInput) -> None:
        """Send a step to the first stage."""

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside; while there is none, for the next one.

        Raises:
            EngineDeadError: A stage is gone, or took longer than `step_timeout_s`.
        """

    async def check_health(self) -> None:
        """Return if all stages answer.

        Raises:
            EngineDeadError: One does not; the message says which.
        """

    async def close(self) -> None:
        """Stop the stages and free what they hold."""
