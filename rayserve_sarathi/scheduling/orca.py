"""Iteration-level batching (Orca, OSDI'22), as Sarathi-Serve (OSDI'24, section 3.1) compares with it."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler


class OrcaScheduler(Scheduler):
    """All decodes, and the whole prompts of all requests that can be admitted, in one step without a limit.

    A request holds KV blocks for `max_model_len` tokens from its admission to its end, so none is ever preempted, and
    few run at once: give `max_num_seqs` as 8 or 16, as the paper does. The token budget has no part in it.
    """

    def choose(self) -> tuple[list[Request], Chunks]:
        """Take everything."""
        decodes, _ = self.take_running()
        return decodes, self.take_prompts()

    def num_tokens_to_hold(self, request: Request) -> int:
        """Return the most that any request may have."""
        return self.max_model_len
