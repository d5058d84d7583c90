import asyncio
from contextlib import aclosing

import pytest

from rayserve_sarathi.openai.errors import EngineFailureError
from rayserve_sarathi.openai.generation import Choice, generate_choice, merge
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams
from rayserve_sarathi.text.stop import StopStrings


class FixedEngine:
    """Yields the given outputs for every request."""

    def __init__(self, *outputs):
        self.outputs = outputs
        self.is_open = False
        self.finished = []

    def finish(self, request_id):
        self.finished.append(request_id)

    async def generate(self, request_id, prompt_token_ids, sampling, *, cache_salt=""):
        self.is_open = True
        try:
            for output in self.outputs:
                yield output
        finally:
            self.is_open = False


def choice(*stops, **sampling):
    return Choice(request_id="r", prompt_token_ids=[1], sampling=SamplingParams(**sampling), stops=StopStrings(stops))


async def test_an_engine_is_let_go_before_the_last_delta_is_handed_out(tokenizer):
    token_ids = tuple(tokenizer.encode("a.b", add_special_tokens=False))
    engine = FixedEngine(RequestOutput("r", token_ids), RequestOutput("r", token_ids))
    async with aclosing(generate_choice(engine, tokenizer, choice("."), index=0)) as deltas:
        delta = await anext(deltas)

        assert (delta.text, delta.finish_reason, delta.num_tokens) == ("a", FinishReason.STOP, 2)
        assert not engine.is_open
        assert engine.finished == ["r"]


async def test_an_output_that_ends_without_a_reason_is_a_fault(tokenizer):
    engine = FixedEngine(RequestOutput("r", (5,)))
    with pytest.raises(EngineFailureError, match="without a reason"):
        [delta async for delta in generate_choice(engine, tokenizer, choice(), index=0)]


async def test_a_request_that_the_engine_aborts_is_a_fault(tokenizer):
    engine = FixedEngine(RequestOutput("r", (), FinishReason.ABORT))
    with pytest.raises(EngineFailureError, match="aborted"):
        [delta async for delta in generate_choice(engine, tokenizer, choice(), index=0)]


async def test_an_incomplete_character_at_the_end_is_replaced(tokenizer):
    token_ids = tuple(tokenizer.encode("a\u4f60", add_special_tokens=False)[:-1])
    engine = FixedEngine(RequestOutput("r", token_ids, FinishReason.LENGTH))
    (delta,) = [delta async for delta in generate_choice(engine, tokenizer, choice(), index=0)]

    assert delta.text == "a\ufffd"


async def count_to(number, closed, *, name="", fails=False):
    try:
        for place in range(number):
            await asyncio.sleep(0)
            yield name, place
        if fails:
            raise RuntimeError("broken")
    finally:
        closed.append(number)


@pytest.mark.parametrize("lengths", [(3,), (0, 3), (2, 5, 1)])
async def test_a_merge_has_every_item_of_every_stream_in_its_order(lengths):
    closed = []
    streams = [count_to(length, closed, name=index) for index, length in enumerate(lengths)]
    items = [item async for item in merge(streams)]

    for index, length in enumerate(lengths):
        assert [item for name, item in items if name == index] == list(range(length))
    assert sorted(closed) == sorted(lengths)


async def test_a_failure_in_a_merge_is_raised_and_closes_the_others():
    closed = []
    with pytest.raises(RuntimeError, match="broken"):
        [item async for item in merge([count_to(1000, closed), count_to(2, closed, fails=True)])]

    assert sorted(closed) == [2, 1000]


@pytest.mark.parametrize("number", [1, 3])
async def test_closing_a_merge_closes_its_streams(number):
    closed = []
    async with aclosing(merge([count_to(1000, closed) for _ in range(number)])) as items:
        await anext(items)

    assert closed == [1000] * number
