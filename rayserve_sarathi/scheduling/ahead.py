"""Whether a step is made up while the one before it runs, which is worth it where steps are short."""

import math

AHEAD_OF_STEP_S = 0.02
"""Steps that take less have the next one made up meanwhile. After a longer one a part of a millisecond on the host does
not matter, but to a request that arrives meanwhile it would that the next step is made up already."""
_RATE = 0.2


class Ahead:
    """Follows how long steps take."""

    def __init__(self) -> None:
        self._step_s = math.inf  # of the last steps, on average; not known before the first
        self._last_back_s = -math.inf

    @property
    def is_worth_it(self) -> bool:
        """Whether the step after the one in flight should be made up now."""
        return self._step_s < AHEAD_OF_STEP_S

    def note(self, launched_s: float, back_s: float) -> None:
        """Note when a step was made up, and when it came back."""
        step_s = back_s - max(launched_s, self._last_back_s)
        self._step_s = step_s if self._step_s == math.inf else self._step_s + _RATE * (step_s - self._step_s)
        self._last_back_s = back_s
