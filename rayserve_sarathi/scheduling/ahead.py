"""When a step is made up while the one before it runs, so that no stage waits for the scheduler."""

import math

AHEAD_S = 0.01
"""So long before a step is believed to end, the next one is made up: many times what that takes, as steps vary and
event loops are late. Not earlier, as a request that arrives after that waits for the step after the next."""
_RATE = 0.2


class Ahead:
    """Follows how long steps take."""

    def __init__(self) -> None:
        self._step_s = math.inf  # of the last steps, on average; not known before the first
        self._last_back_s = -math.inf

    def due_s(self, launched_s: float) -> float:
        """Return when to make up the step after the newest one, which was made up at `launched_s`; inf if never."""
        return max(launched_s, self._last_back_s) + self._step_s - AHEAD_S

    def note(self, launched_s: float, back_s: float) -> None:
        """Note when a step was made up, and when it came back."""
        step_s = back_s - max(launched_s, self._last_back_s)
        self._step_s = step_s if self._step_s == math.inf else self._step_s + _RATE * (step_s - self._step_s)
        self._last_back_s = back_s
