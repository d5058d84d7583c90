"""When requests are sent."""

import asyncio

from rayserve_sarathi.bench.load import Send, Tally, run_closed_loop, run_open_loop
from rayserve_sarathi.bench.outcome import Outcome
from tests.bench.outcomes import FULL, make_outcome

TIMEOUT_S = 20.0


class Answers:
    """Answers requests when a test lets it, and remembers them."""

    def __init__(self, *, failing: tuple[int, ...] = (), num_requests: int = 3) -> None:
        self.prepared: list[int] = []
        self.sent: list[int] = []
        self.may_end = asyncio.Event()
        self.all_open = asyncio.Event()
        self.num_open = 0
        self._num_requests = num_requests
        self.most_open = 0
        self._failing = failing

    def prepare(self, index: int) -> Send:
        self.prepared.append(index)

        async def send(due_s: float) -> Outcome:
            self.sent.append(index)
            self.num_open += 1
            self.most_open = max(self.most_open, self.num_open)
            if self.num_open == self._num_requests:
                self.all_open.set()
            await self.may_end.wait()
            await asyncio.sleep(0)
            self.num_open -= 1
            failure = FULL if index in self._failing else None
            return make_outcome([due_s + 1.0], sent_s=due_s, prompt=index, failure=failure)

        return send


async def test_an_open_loop_sends_on_while_nothing_ends():
    answers = Answers()
    tally = Tally(num_requests=3)
    async with asyncio.timeout(TIMEOUT_S):
        running = asyncio.create_task(run_open_loop(answers.prepare, [0.0, 0.001, 0.002], tally))
        await answers.all_open.wait()
        assert not tally.outcomes
        answers.may_end.set()
        await running

    due_s = sorted(outcome.due_s for outcome in tally.outcomes)
    assert answers.sent == [0, 1, 2]
    assert [round(1e3 * (time_s - due_s[0])) for time_s in due_s] == [0, 1, 2]


async def test_a_request_is_never_sent_before_it_is_due():
    answers = Answers()
    answers.may_end.set()
    loop = asyncio.get_running_loop()
    begin_s = loop.time()
    async with asyncio.timeout(TIMEOUT_S):
        await run_open_loop(answers.prepare, [0.0, 0.05], Tally(num_requests=2))

    assert loop.time() - begin_s >= 0.05
    assert answers.prepared == answers.sent == [0, 1]


async def test_a_closed_loop_has_as_many_open_as_clients_and_sends_all():
    answers = Answers()
    answers.may_end.set()
    tally = Tally(num_requests=10)
    async with asyncio.timeout(TIMEOUT_S):
        await run_closed_loop(answers.prepare, num_clients=3, tally=tally)

    assert answers.most_open == 3
    assert answers.sent == list(range(10))
    assert (tally.num_sent, tally.num_open) == (10, 0)


async def test_a_refused_client_waits_for_as_long_as_it_is_told(monkeypatch):
    answers = Answers(failing=(1,))
    answers.may_end.set()
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note_sleep(delay_s: float) -> None:
        waits.append(delay_s)
        await sleep(0)

    monkeypatch.setattr(asyncio, "sleep", note_sleep)
    tally = Tally(num_requests=3)
    await run_closed_loop(answers.prepare, num_clients=1, tally=tally)

    assert [wait_s for wait_s in waits if wait_s] == [3.0]
    assert tally.num_failed == 1


async def test_more_clients_than_requests_are_no_harm():
    answers = Answers()
    answers.may_end.set()
    await run_closed_loop(answers.prepare, num_clients=5, tally=Tally(num_requests=2))

    assert answers.sent == [0, 1]
