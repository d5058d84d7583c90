"""Stop strings: cut a growing text at the first one, and hold back whatever may become one.

The first stop string is the one that is complete first, and the longest of those that end at the same character, so the
result does not depend on how the text was cut into tokens. The search is Knuth, Morris and Pratt's, one state for each
stop string, so that each character is looked at once.
"""

from collections.abc import Sequence


class StopStrings:
    """Stop strings, prepared once for all the choices of a request.

    Args:
        stops: None of them empty.
        is_included: Whether the stop string itself stays in the text.
    """

    def __init__(self, stops: Sequence[str] = (), *, is_included: bool = False) -> None:
        assert all(stops), f"empty stop string in {stops!r}"
        self.stops = tuple(dict.fromkeys(stops))
        self.is_included = is_included
        self.first_characters = frozenset(stop[0] for stop in self.stops)
        self.fallbacks = tuple(_fallbacks(stop) for stop in self.stops)


def _fallbacks(stop: str) -> tuple[int, ...]:
    """For each n, how much of the stop's beginning is still matched when n characters were and the next differs."""
    fallbacks = [0, 0]
    for character in stop[1:]:
        length = fallbacks[-1]
        while length and stop[length] != character:
            length = fallbacks[length]
        fallbacks.append(length + (stop[length] == character))
    return tuple(fallbacks)


class StopChecker:
    """Passes on the text of one output up to the first stop string."""

    def __init__(self, stops: StopStrings) -> None:
        self.matched: str | None = None
        """The stop string that ended the text; None if none did."""
        self._stops = stops
        self._states = [0] * len(stops.stops)  # how many characters of each stop the text ends with
        self._held = ""  # as long as the largest of the states

    def push(self, text: str) -> str:
        """Return the text that can be shown now."""
        assert self.matched is None, f"text after the stop string {self.matched!r}"
        if not self._held and self._stops.first_characters.isdisjoint(text):
            return text
        buffer = self._held + text
        for position, character in enumerate(text, start=len(self._held) + 1):
            self._advance(character)
            if self.matched is not None:
                self._held = ""
                return buffer[: position if self._stops.is_included else position - len(self.matched)]
        shown = len(buffer) - max(self._states)
        self._held = buffer[shown:]
        return buffer[:shown]

    def flush(self) -> str:
        """Return the text held back, at the end of the output."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> None:
        for index, stop in enumerate(self._stops.stops):
            state = self._states[index]
            fallbacks = self._stops.fallbacks[index]
            while state and stop[state] != character:
                state = fallbacks[state]
            state += stop[state] == character
            self._states[index] = state
            if state == len(stop) and (self.matched is None or state > len(self.matched)):
                self.matched = stop
