"""One box per ingress: batched, claimed, given up."""

import asyncio

from rayserve_sarathi.actors.outboxes import Outboxes
from rayserve_sarathi.request import FinishReason, RequestOutput
from rayserve_sarathi.routing import Call


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_outputs_of_many_requests_come_as_one_batch():
    boxes = Outboxes(clock=Clock())
    for request_id in ("a", "b"):
        boxes.open(Call("ingress", 1), request_id)
    boxes.deliver([RequestOutput("a", (1,)), RequestOutput("b", (2,))])
    boxes.deliver([RequestOutput("a", (3,), FinishReason.LENGTH), RequestOutput("unknown", (9,))])
    stream = boxes.read("ingress")

    assert [output.token_ids for output in await anext(stream)] == [(1,), (2,), (3,)]


async def test_an_ingress_gets_only_what_is_its_own():
    boxes = Outboxes(clock=Clock())
    boxes.open(Call("one", 1), "a")
    boxes.open(Call("two", 1), "b")
    boxes.deliver([RequestOutput("a", (1,)), RequestOutput("b", (2,))])

    assert [output.request_id for output in await anext(boxes.read("two"))] == ["b"]


async def test_a_stream_ends_once_nothing_is_open():
    boxes = Outboxes(clock=Clock())
    boxes.open(Call("ingress", 1), "a")
    boxes.deliver([RequestOutput("a", (1,), FinishReason.STOP)])

    assert [len(batch) async for batch in boxes.read("ingress")] == [1]
    assert [batch async for batch in boxes.read("never heard of")] == []


async def test_a_stream_without_outputs_shows_that_it_is_alive_and_is_heard_as_a_reader():
    clock = Clock()
    boxes = Outboxes(clock=clock)
    boxes.open(Call("ingress", 1), "a")
    clock.now_s = 29.0

    assert await anext(boxes.read("ingress")) == []
    clock.now_s = 58.0
    assert boxes.expire() == set()


async def test_a_new_stream_takes_over_from_an_old_one():
    boxes = Outboxes(clock=Clock())
    boxes.open(Call("ingress", 1), "a")
    old = asyncio.create_task(anext(boxes.read("ingress"), None))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    new = asyncio.create_task(anext(boxes.read("ingress"), None))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    boxes.deliver([RequestOutput("a", (1,))])

    assert await old is None
    assert [output.token_ids for output in await new or []] == [(1,)]


async def test_a_request_that_two_claims_do_not_name_is_abandoned():
    boxes = Outboxes(clock=Clock())
    for request_id in ("kept", "lost"):
        boxes.open(Call("ingress", 1), request_id)

    assert boxes.claim("ingress", ["kept"]) == set()
    boxes.open(Call("ingress", 1), "new")
    assert boxes.claim("ingress", ["kept"]) == {"lost"}
    assert boxes.claim("ingress", ["kept", "new"]) == set()


async def test_the_requests_of_a_silent_ingress_are_given_up():
    clock = Clock()
    boxes = Outboxes(clock=clock)
    boxes.open(Call("silent", 1), "a")
    boxes.open(Call("alive", 1), "b")
    clock.now_s = 20.0
    boxes.claim("alive", ["b"])
    clock.now_s = 40.0

    assert boxes.expire() == {"a"}
    assert boxes.expire() == set()


async def test_a_reader_that_comes_first_waits_for_the_outputs():
    boxes = Outboxes(clock=Clock())
    boxes.open(Call("ingress", 1), "a")
    reading = asyncio.create_task(anext(boxes.read("ingress")))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    boxes.deliver([RequestOutput("a", (1,))])

    assert [output.token_ids for output in await reading] == [(1,)]


def test_it_knows_the_last_call_of_each_ingress_that_is_not_silent():
    clock = Clock()
    boxes = Outboxes(clock=clock)
    for number in (1, 3, 2):  # calls may overtake each other
        boxes.open(Call("ingress", number), str(number))
    boxes.open(Call("silent", 9), "a")
    clock.now_s = 31.0
    boxes.claim("ingress", "123")
    assert boxes.last_calls() == {"ingress": 3, "silent": 9}
    boxes.expire()

    assert boxes.last_calls() == {"ingress": 3}
