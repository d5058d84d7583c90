"""Request-level batching (FasterTransformer), as Sarathi-Serve (OSDI'24, section 3.1) describes it."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler


class FasterTransformerScheduler(Scheduler):
    """A batch of requests from their prompts to the last one's end; only then the next batch.

    Decodes never wait for a prompt, and what ends early leaves its place in the batch empty. Memory is that of
    `OrcaScheduler`. The token budget has no part in it.
    """

    def choose(self) -> tuple[list[Request], Chunks]:
        """Decode the batch; begin one if there is none."""
        if not self.running:
            return [], self.take_prompts()
        decodes, _ = self.take_running()
        return decodes, {}

    def num_tokens_to_hold(self, request: Request) -> int:
        """Return the most that any request may have."""
        return self.max_model_len
