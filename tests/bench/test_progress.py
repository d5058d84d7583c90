"""What is shown while a load runs."""

import asyncio
import io

from rayserve_sarathi.bench.load import Tally
from rayserve_sarathi.bench.progress import shown_progress
from tests.bench.outcomes import FULL, make_outcome

TIMEOUT_S = 10.0


class Screen(io.StringIO):
    """A stream that tells when something was written; perhaps a terminal."""

    def __init__(self, *, is_terminal: bool) -> None:
        super().__init__()
        self._is_terminal = is_terminal
        self.was_written = asyncio.Event()

    def isatty(self) -> bool:
        return self._is_terminal

    def flush(self) -> None:
        self.was_written.set()


def half_done() -> Tally:
    tally = Tally(num_requests=9, num_sent=4)
    tally.outcomes = [make_outcome([0.25, 0.5]), make_outcome([], failure=FULL)]
    return tally


async def shown(*, is_terminal: bool) -> str:
    screen = Screen(is_terminal=is_terminal)
    async with asyncio.timeout(TIMEOUT_S):
        async with shown_progress(half_done(), num_tokens=lambda: 2, stream=screen, period_s=0.001):
            await screen.was_written.wait()
    return screen.getvalue()


async def test_a_line_tells_how_far_it_is():
    text = await shown(is_terminal=False)

    assert "2 of 9 requests done, 2 open, 1 failed, 0 tokens/s, recent TTFT 250 ms\n" in text
    assert "\r" not in text


async def test_a_terminal_has_one_line_which_is_gone_at_the_end():
    text = await shown(is_terminal=True)

    assert "\n" not in text
    assert text.startswith("\r\x1b[K0 s: 2 of 9")
    assert text.endswith("\r\x1b[K")


async def test_what_is_over_before_the_first_line_shows_none():
    screen = Screen(is_terminal=False)
    async with shown_progress(half_done(), num_tokens=lambda: 0, stream=screen):
        pass

    assert screen.getvalue() == ""
