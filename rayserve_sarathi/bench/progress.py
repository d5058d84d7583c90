"""How far a load is, while it runs: one line that is rewritten on a terminal, a line every ten seconds elsewhere."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from statistics import median
from typing import TextIO

from rayserve_sarathi.bench.load import Tally

_TERMINAL_PERIOD_S = 0.5
_LOG_PERIOD_S = 10.0
_NUM_RECENT = 50


@asynccontextmanager
async def shown_progress(
    tally: Tally, *, num_tokens: Callable[[], int], stream: TextIO, period_s: float | None = None
) -> AsyncIterator[None]:
    """Show progress on `stream` for as long as the block runs.

    Args:
        tally: What to show.
        num_tokens: Tells how many tokens have come so far.
        stream: Usually stderr.
        period_s: How often; None for what suits the stream.
    """
    is_terminal = stream.isatty()
    if period_s is None:
        period_s = _TERMINAL_PERIOD_S if is_terminal else _LOG_PERIOD_S
    showing = asyncio.create_task(_show(tally, num_tokens, stream, period_s=period_s, is_terminal=is_terminal))
    try:
        yield
    finally:
        showing.cancel()
        await asyncio.gather(showing, return_exceptions=True)
        if is_terminal:
            stream.write("\r\x1b[K")
            stream.flush()


async def _show(
    tally: Tally, num_tokens: Callable[[], int], stream: TextIO, *, period_s: float, is_terminal: bool
) -> None:
    num_before, before_s = num_tokens(), time.perf_counter()
    while True:
        await asyncio.sleep(period_s)
        num_now, now_s = num_tokens(), time.perf_counter()
        text = _line(tally, now_s, (num_now - num_before) / (now_s - before_s))
        num_before, before_s = num_now, now_s
        stream.write(f"\r\x1b[K{text}" if is_terminal else f"{text}\n")
        stream.flush()


def _line(tally: Tally, now_s: float, tokens_per_s: float) -> str:
    recent = [outcome.ttft_s for outcome in tally.outcomes[-_NUM_RECENT:] if outcome.failure is None]
    ttft = f", recent TTFT {1e3 * median(recent):.0f} ms" if recent else ""
    failed = f", {tally.num_failed} failed" if tally.num_failed else ""
    return (
        f"{now_s - tally.start_s:.0f} s: {len(tally.outcomes)} of {tally.num_requests} requests done,"
        f" {tally.num_open} open{failed}, {tokens_per_s:.0f} tokens/s{ttft}"
    )
