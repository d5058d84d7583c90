"""Stall-free batching (Sarathi-Serve, OSDI'24, section 4.2 and algorithm 3)."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler


class SarathiScheduler(Scheduler):
    """Decodes first, then ongoing prefills, then new requests, up to the token budget.

    With `max_num_partial_prefills` above 1, each of that many prompts gets an even share of what the decodes leave, so
    no more can be half computed; what short prompts leave of their share goes to the oldest.
    """

    def choose(self) -> tuple[list[Request], Chunks]:
        """Fill the budget; with more decodes than budget, they are the whole step."""
        decodes, ongoing = self.take_running()
        budget = self.config.token_budget - len(decodes)
        prefills: Chunks = {}
        if budget <= 0:
            return decodes, prefills
        share = -(-budget // self.config.max_num_partial_prefills)
        for request in ongoing:
            if budget == 0:
                break
            prefills[request] = min(request.num_tokens - request.num_scheduled_tokens, share, budget)
            budget -= prefills[request]
        while budget and (admitted := self.admit_next()) is not None:
            prefills[admitted] = min(admitted.num_tokens - admitted.num_computed_tokens, share, budget)
            budget -= prefills[admitted]
        for request, num_new in prefills.items():
            extra = min(request.num_tokens - request.num_scheduled_tokens - num_new, budget)
            prefills[request] += extra
            budget -= extra
        return decodes, prefills
