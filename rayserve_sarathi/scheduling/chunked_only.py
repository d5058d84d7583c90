"""Chunked prefills without hybrid batches: an ablation of Sarathi-Serve (OSDI'24, section 5.4)."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler
from rayserve_sarathi.scheduling.plan import StepPlan


class ChunkedOnlyScheduler(Scheduler):
    """Steps of chunks and steps of decodes in turn, where there are both; chunks fill the token budget."""

    def choose(self) -> tuple[list[Request], Chunks]:
        """Take chunks, unless the step before did and something can decode."""
        decodes, ongoing = self.take_running()
        if decodes and self.newest_has_chunks:
            return decodes, {}
        chunks = self.take_chunks(ongoing, self.config.max_token_budget)
        return ([], chunks) if chunks else (decodes, {})

    def is_repeated(self, plan: StepPlan) -> bool:
        """A turn of decodes, only while no request waits: whether one can be admitted shows in the next turn."""
        return not plan.prefills and not self.has_queued
