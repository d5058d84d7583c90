"""One box per ingress: batched, claimed, given up."""

import asyncio

from rayserve_sarathi.actors.outboxes import Outboxes
from rayserve_sarathi.request import FinishReason, RequestOutput


class Clock:
    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


async def test_outputs_of_many_requests_come_as_one_batch():
    boxes = Outboxes(clock=Clock())
    for request_id in ("a", "b"):
        boxes.open("ingress", request_id)
    boxes.deliver([RequestOutput("a", (1,)), RequestOutput("b", (2,))])
    boxes.deliver([RequestOutput("a", (3,), FinishReason.LENGTH), RequestOutput("unknown", (9,))])
    stream = boxes.read("ingress")

    assert [output.token_ids for output in await anext(stream)] == [(1,), (2,), (3,)]


async def test_an_ingress_gets_only_what_is_its_own():
    boxes = Outboxes(clock=Clock())
    boxes.open("one", "a")
    boxes.open("two", "b")
    boxes.deliver([RequestOutput("a", (1,)), RequestOutput("b", (2,))])

    assert [output.request_id for output in await anext(boxes.read("two"))] == ["b"]


async def test_a_stream_ends_once_nothing_is_open():
    boxes = Outboxes(clock=Clock())
    boxes.open("ingress", "a")
    boxes.deliver([RequestOutput("a", (1,), FinishReason.STOP)])

    assert [len(batch) async for batch in boxes.read("ingress")] == [1]
    assert [batch async for batch in boxes.read("never heard of")] == []


async def test_a_stream_without_outputs_shows_that_it_is_alive_and_is_heard_as_a_reader():
    clock = Clock()
    boxes = Outboxes(clock=clock)
    boxes.open("ingress", "a")
    clock.now_s = 29.0

    assert await anext(boxes.read("ingress")) == []
    clock.now_s = 58.0
    assert boxes.expire() == set()


async def test_a_new_stream_takes_over_from_an_old_one():
    boxes = Outboxes(clock=Clock())
    boxes.open("ingress", "a")
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
        boxes.open("ingress", request_id)

    assert boxes.claim("ingress", ["kept"]) == set()
    boxes.open("ingress", "new")
    assert boxes.claim("ingress", ["kept"]) == {"lost"}
    assert boxes.claim("ingress", ["kept", "new"]) == set()


async def test_the_requests_of_a_silent_ingress_are_given_up():
    clock = Clock()
    boxes = Outboxes(clock=clock)
    boxes.open("silent", "a")
    boxes.open("alive", "b")
    clock.now_s = 20.0
    boxes.claim("alive", ["b"])
    clock.now_s = 40.0

    assert boxes.expire() == {"a"}
    assert boxes.expire() == set()


async def test_a_reader_that_comes_first_waits_for_the_outputs():
    boxes = Outboxes(clock=Clock())
    boxes.open("ingress", "a")
    reading = asyncio.create_task(anext(boxes.read("ingress")))  # type: ignore[arg-type]
    await asyncio.sleep(0)
    boxes.deliver([RequestOutput("a", (1,))])

    assert [output.token_ids for output in await reading] == [(1,)]
