"""Hybrid batches without chunked prefills: an ablation of Sarathi-Serve (OSDI'24, section 5.4)."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler


class HybridOnlyScheduler(Scheduler):
    """All decodes, and whole prompts of new requests, together at most `max_model_len` tokens of them.

    The token budget has no part in it.
    """

    def choose(self) -> tuple[list[Request], Chunks]:
        """Take the decodes, then the prompts."""
        decodes, _ = self.take_running()
        return decodes, self.take_prompts(self.max_model_len)
