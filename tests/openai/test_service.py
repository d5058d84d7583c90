"""The API without HTTP, as other applications use it."""

import asyncio
from contextlib import aclosing

import pytest

from rayserve_sarathi.errors import InvalidRequestError
from tests.openai.scripted_engine import TIMEOUT_S

BODY = {"prompt": "a", "max_tokens": 5}
CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 5}


async def test_the_streams_add_up_to_the_answers(make_api):
    service = make_api().service
    whole = await service.completions(BODY)
    parts = [chunk["choices"][0]["text"] async for chunk in service.stream_completions(BODY)]
    assert "".join(parts) == whole["choices"][0]["text"]

    chat = await service.chat_completions(CHAT)
    deltas = [chunk["choices"][0]["delta"]["content"] async for chunk in service.stream_chat_completions(CHAT)]
    assert "".join(deltas) == chat["choices"][0]["message"]["content"]


@pytest.mark.parametrize("call", ["completions", "chat_completions"])
async def test_one_answer_cannot_be_a_stream(make_api, call):
    with pytest.raises(InvalidRequestError, match="stream"):
        await getattr(make_api().service, call)({**BODY, "stream": True})


@pytest.mark.parametrize("n", [1, 3])
async def test_a_stream_that_is_closed_ends_its_requests(make_api, n):
    api = make_api()
    async with aclosing(api.service.stream_completions({**BODY, "n": n})) as chunks:
        await anext(chunks)
        assert api.engine.num_open == n

    assert (api.engine.num_open, api.engine.num_aborted) == (0, n)


@pytest.mark.parametrize("n", [1, 2])
async def test_a_reader_that_is_slower_than_the_target_is_noted_with_the_token_it_held_up(make_api, n):
    api = make_api(tbt_s=0.02)
    num_read = 0
    async for _ in api.service.stream_completions({**BODY, "n": n}):
        num_read += 1
        if num_read == n + 1:  # the second token of the first choice
            await asyncio.sleep(0.03)

    (held,) = [(name, gap) for name, gap in api.engine.late if gap.position == 1]
    assert held[0] == api.engine.asked[0].request_id
    assert held[1].gap_s >= 0.03
    assert held[1].cause == "slow_reader"


@pytest.mark.parametrize("tbt_s", [None, 100.0])
async def test_a_reader_is_not_slow_within_the_target_or_without_one(make_api, tbt_s):
    api = make_api(tbt_s=tbt_s)
    async for _ in api.service.stream_completions(BODY):
        await asyncio.sleep(0.001)

    assert api.engine.late == []


async def test_an_answer_that_is_cancelled_ends_its_requests(make_api):
    api = make_api(hangs_after=1)
    waiting = asyncio.create_task(api.service.chat_completions({**CHAT, "n": 2}))
    async with asyncio.timeout(TIMEOUT_S):
        await api.engine.is_hanging.wait()
    waiting.cancel()
    await asyncio.gather(waiting, return_exceptions=True)

    assert api.engine.num_open == 0


async def test_a_long_prompt_is_tokenised_beside_the_event_loop(make_api):
    service = make_api().service
    ticks = 0

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0)
            ticks += 1

    ticking = asyncio.create_task(tick())
    await service.tokenize({"prompt": "hello world " * 20_000})
    ticking.cancel()

    assert ticks > 100
