"""Prompts first, as vLLM of 2023 did it and as Sarathi-Serve (OSDI'24, section 3.1) describes it."""

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.base import Chunks, Scheduler


class VllmScheduler(Scheduler):
    """Whole prompts of new requests, together at most `max_model_len` tokens; while there are none, decodes.

    A prompt that arrives stalls every decode for as long as it takes. The token budget has no part in it.
    """

    def choose(self) -> tuple[list[Request], Chunks]:
        """Admit what can be; decode otherwise."""
        if prompts := self.take_prompts(self.max_model_len):
            return [], prompts
        decodes, _ = self.take_running()
        return decodes, {}
