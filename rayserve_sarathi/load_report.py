"""One line for the log, every few seconds while there is load: what a pipeline does now."""

from rayserve_sarathi.metrics import Snapshot


class LoadReport:
    """Compares a pipeline's counters with what they were when it was last asked.

    Args:
        now_s: When the counters were zero.
    """

    def __init__(self, now_s: float) -> None:
        self._last_s = now_s
        self._num_prompt_tokens = 0
        self._num_generation_tokens = 0

    def line(self, snapshot: Snapshot, now_s: float) -> str | None:
        """Return the line for the time since the last call; None if nothing ran in it and nothing does."""
        metrics, state = snapshot.metrics, snapshot.state
        num_prompt_tokens = metrics.num_prompt_tokens - self._num_prompt_tokens
        num_generation_tokens = metrics.num_generation_tokens - self._num_generation_tokens
        elapsed_s = now_s - self._last_s
        self._last_s = now_s
        self._num_prompt_tokens = metrics.num_prompt_tokens
        self._num_generation_tokens = metrics.num_generation_tokens
        if not (num_prompt_tokens or num_generation_tokens or state.num_requests_running or state.num_requests_waiting):
            return None
        bubbles = ", ".join(f"{stage.recent_bubble_share:.1%}" for stage in snapshot.stages)
        return (
            f"running {state.num_requests_running}, waiting {state.num_requests_waiting}, "
            f"prompt {num_prompt_tokens / elapsed_s:.1f} tokens/s, "
            f"generation {num_generation_tokens / elapsed_s:.1f} tokens/s, "
            f"KV cache {state.kv_cache_usage:.1%}, steps in flight {state.num_steps_in_flight}, "
            f"bubbles {bubbles or 'unknown'}"
        )
