"""The visible text of one output: detokenised, and cut at the first stop string."""

from rayserve_sarathi.text.detokenizer import Detokenizer
from rayserve_sarathi.text.stop import StopChecker, StopStrings


class OutputText:
    """Turns the tokens of one output into the text that its client sees.

    Args:
        detokenizer: A fresh one.
        stops: Where to cut.
        min_tokens: Stop strings in the text of the first `min_tokens` tokens do not count.
    """

    def __init__(self, detokenizer: Detokenizer, stops: StopStrings, *, min_tokens: int = 0) -> None:
        self._detokenizer = detokenizer
        self._checker = StopChecker(stops)
        self._num_unchecked_tokens = min_tokens
        self.num_chars = 0
        """Characters of the tokens so far, held back or not."""
        self.num_shown_chars = 0
        """Characters returned so far."""

    @property
    def matched_stop(self) -> str | None:
        """The stop string that ended the text; None if none has."""
        return self._checker.matched

    def push(self, token_id: int) -> str:
        """Return the text that can be shown after a further token."""
        text = self._detokenizer.push(token_id)
        self.num_chars += len(text)
        if self._num_unchecked_tokens > 0:
            self._num_unchecked_tokens -= 1
        else:
            text = self._checker.push(text)
        self.num_shown_chars += len(text)
        return text

    def flush(self) -> str:
        """Return the rest of the text, at the end of an output that no stop string has ended."""
        text = self._checker.push(self._detokenizer.flush())
        if self._checker.matched is None:
            text += self._checker.flush()
        self.num_shown_chars += len(text)
        return text
