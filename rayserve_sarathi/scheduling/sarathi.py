"""Stall-free batching (Sarathi-Serve, OSDI'24, section 4.2 and algorithm 3)."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler
from rayserve_sarathi.scheduling.plan import StepPlan


class SarathiScheduler(Scheduler):
    """Decodes first, then ongoing prefills, then new requests, up to the token budget."""

    def choose(self) -> tuple[list[Request], Chunks]:
        """Fill the budget; with more decodes than budget, they are the whole step."""
        decodes, ongoing = self.take_running()
        return decodes, self.take_chunks(ongoing, self.room_for_prompts(decodes, ongoing))

    def is_repeated(self, plan: StepPlan) -> bool:
        """Also a chunk that fills the budget, as long as its prompt is not at its end: no other gets a token."""
        if not plan.prefills:
            return True
        is_full = len(plan.prefills) == 1 and plan.num_tokens == self.config.token_budget
        return is_full and self.config.max_num_partial_prefills == 1
