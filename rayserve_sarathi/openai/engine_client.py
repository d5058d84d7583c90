"""What the HTTP side needs of an engine, wherever that engine runs."""

from collections.abc import AsyncIterator, Sequence
from typing import Protocol

from rayserve_sarathi.request import RequestOutput, SamplingParams
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.step_log import PipelineTrace


class EngineClient(Protocol):
    """An engine as its clients see it: the scheduler actor behind a handle, or an engine in this process."""

    @property
    def tbt_s(self) -> float | None:
        """The target of the time between two tokens, in seconds; None if there is none."""

    async def check_capacity(self, num_requests: int) -> None:
        """Return if `num_requests` more requests would be accepted now; called before they are tokenised.

        Raises:
            OverloadedError: They would not.
            EngineDeadError: No pipeline is alive.
        """

    def generate(
        self,
        request_id: str,
        prompt_token_ids: Sequence[int],
        sampling: SamplingParams,
        *,
        cache_salt: str = "",
    ) -> AsyncIterator[RequestOutput]:
        """Yield what each step does for a request; the last output has a finish reason.

        It is an async generator. Closing it before its end, or cancelling who awaits it, aborts the request.

        Args:
            request_id: Unique; never a string that a client chose.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: The queue is full.
            EngineDeadError: No pipeline is alive.
        """

    def finish(self, request_id: str) -> None:
        """End a request whose text is complete (a stop string was found): it counts as stopped, not as aborted.

        Then the generator of `generate` is to be closed.
        """

    def note_late(self, request_id: str, gap: LateGap) -> None:
        """Hear of a token that was there in time, and reached the client late; its request may have ended."""

    async def check_ready(self) -> None:
        """Return if the engine is up (its first tokens have gone through all stages) and all stages answer.

        Raises:
            EngineDeadError: Starting, draining, or dead; the message says which.
        """

    async def metrics(self) -> str:
        """Return the engine's metrics in Prometheus's text format."""

    async def trace(self) -> list[PipelineTrace]:
        """Return the last steps of each pipeline that answers."""

    async def why(self, request_id: str) -> list[LateReport]:
        """Return which tokens came later than `slo.tbt_s`, and why, of the requests whose id is, or begins with, this.

        None for a request without late tokens, or one that is forgotten.
        """
