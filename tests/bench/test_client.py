"""What a client makes of answers, good and bad."""

import asyncio
import time

import pytest

from rayserve_sarathi.bench.client import CompletionClient
from rayserve_sarathi.bench.outcome import FailureKind, Outcome
from tests.bench.scripted_server import (
    DONE,
    END,
    STREAM_HEAD,
    Answer,
    event,
    part,
    refusal,
    scripted_server,
    silence,
    stream,
    token,
    total,
)

TIMEOUT_S = 20.0


async def outcome_of(answer: Answer, *, timeout_s: float = TIMEOUT_S) -> Outcome:
    async with scripted_server([answer]) as url:
        return await ask(url, timeout_s=timeout_s)


async def ask(url: str, *, timeout_s: float = TIMEOUT_S) -> Outcome:
    async with asyncio.timeout(TIMEOUT_S), CompletionClient(url, model="tiny", timeout_s=timeout_s) as client:
        body = client.encode([1, 2, 3], num_tokens=4)
        return await client.complete(body, num_prompt_tokens=3, num_tokens=4, due_s=0.0)


def num_tokens_together(outcome: Outcome) -> list[int]:
    """How many tokens came at each time, in order."""
    times_s = list(outcome.token_times_s)
    assert times_s == sorted(times_s)
    return [times_s.count(time_s) for time_s in sorted(set(times_s))]


async def test_the_body_asks_for_the_tokens_and_for_their_number_in_every_chunk():
    bodies: list[dict[str, object]] = []
    async with (
        scripted_server([stream(event(token()), DONE)], bodies=bodies) as url,
        CompletionClient(url, model="tiny", extra_body={"min_tokens": 2}) as client,
    ):
        body = client.encode([5, 6], num_tokens=9)
        await client.complete(body, num_prompt_tokens=2, num_tokens=9, due_s=0.0)

    assert bodies == [
        {
            "model": "tiny",
            "prompt": [5, 6],
            "max_tokens": 9,
            "min_tokens": 2,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        }
    ]


async def test_every_token_has_the_time_of_its_chunk():
    counts = (1, 2, 4)
    outcome = await outcome_of(stream(*(event(token(num_tokens=count)) for count in counts), event(total(4)), DONE))

    assert outcome.failure is None
    assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (7, 4)
    assert len(outcome.token_times_s) == 4
    assert outcome.token_times_s[2] == outcome.token_times_s[3]
    assert outcome.sent_s <= outcome.token_times_s[0] <= outcome.token_times_s[3] <= outcome.end_s


async def test_a_token_has_the_time_of_its_arrival_and_not_of_the_end():
    is_sent, may_go_on = asyncio.Event(), asyncio.Event()

    async def pause(writer: asyncio.StreamWriter) -> None:
        writer.write(STREAM_HEAD + part(event(token(num_tokens=1))))
        await writer.drain()
        is_sent.set()
        await may_go_on.wait()
        writer.write(part(event(token(num_tokens=2)) + DONE) + END)

    async with (
        asyncio.timeout(TIMEOUT_S),
        scripted_server([pause]) as url,
        CompletionClient(url, model="tiny") as client,
    ):
        body = client.encode([1], num_tokens=2)
        asking = asyncio.create_task(client.complete(body, num_prompt_tokens=1, num_tokens=2, due_s=0.0))
        await is_sent.wait()
        while not client.num_tokens:  # noqa: ASYNC110  # the client tells nobody; it is in this loop, a turn or two away
            await asyncio.sleep(0)
        between_s = time.perf_counter()
        may_go_on.set()
        outcome = await asking

    assert outcome.token_times_s[0] < between_s < outcome.token_times_s[1]


async def test_a_chunk_without_text_counts_if_its_usage_says_so():
    # Half of a character: a token, but nothing to show yet.
    outcome = await outcome_of(stream(event(token("", num_tokens=1)), event(token("", num_tokens=2)), DONE))

    assert len(outcome.token_times_s) == outcome.num_output_tokens == 2


async def test_tokens_that_only_the_total_tells_of_came_with_others():
    outcome = await outcome_of(stream(event(token()), event(token()), event(token("")), event(total(5)), DONE))

    assert outcome.num_output_tokens == len(outcome.token_times_s) == 5
    assert len(set(outcome.token_times_s)) <= 2


async def test_without_any_usage_chunks_with_text_are_counted_and_the_outcome_says_so():
    outcome = await outcome_of(stream(event(token()), event(token()), event(token("")), DONE))

    assert (outcome.num_prompt_tokens, outcome.num_output_tokens) == (3, 2)
    assert not outcome.has_usage


async def test_several_events_in_one_read_are_all_counted():
    events = b"".join(event(token(num_tokens=count)) for count in (1, 2, 3))
    outcome = await outcome_of(stream(events[:50], events[50:] + DONE))

    assert outcome.failure is None
    assert outcome.num_output_tokens == 3


@pytest.mark.parametrize(
    ("answer", "kind", "message"),
    [
        (stream(event(token(num_tokens=1)), is_whole=False), FailureKind.DISCONNECT, "ended inside the stream"),
        (stream(event(token(num_tokens=1))), FailureKind.DISCONNECT, "without [DONE]"),
        (stream(event({"error": {"message": "gone"}}), DONE), FailureKind.ERROR_EVENT, "gone"),
        (stream(b"data: {no json}\n\n", DONE), FailureKind.MALFORMED, "{no json}"),
        (stream(b"data: 3\n\n", DONE), FailureKind.MALFORMED, "no JSON object"),
        (stream(DONE), FailureKind.MALFORMED, "without a token"),
        (refusal("200 OK", b"{}"), FailureKind.MALFORMED, "application/json, no stream"),
        (refusal("500 Oops", b"plain text"), FailureKind.STATUS, "plain text"),
    ],
)
async def test_a_fault_is_an_outcome_of_its_kind(answer: Answer, kind: FailureKind, message: str):
    outcome = await outcome_of(answer)

    assert outcome.failure is not None
    assert outcome.failure.kind is kind
    assert message in outcome.failure.message


async def test_tokens_before_a_fault_are_kept():
    outcome = await outcome_of(stream(event(token(num_tokens=1)), event(token(num_tokens=2)), is_whole=False))

    assert len(outcome.token_times_s) == 2


async def test_a_refusal_tells_status_message_and_when_to_come_back():
    body = b'{"error": {"message": "the queue is full", "code": "overloaded"}}'
    outcome = await outcome_of(refusal("429 Too Many Requests", body, "retry-after: 3"))

    assert outcome.failure is not None
    assert outcome.failure.label == "status 429"
    assert (outcome.failure.message, outcome.failure.retry_after_s) == ("the queue is full", 3.0)


async def test_a_stream_that_stops_is_a_timeout():
    outcome = await outcome_of(silence, timeout_s=0.2)

    assert outcome.failure is not None
    assert outcome.failure.kind is FailureKind.TIMEOUT
    assert len(outcome.token_times_s) == 1


async def test_no_server_is_a_failed_connection():
    outcome = await ask("http://127.0.0.1:1")

    assert outcome.failure is not None
    assert outcome.failure.kind is FailureKind.CONNECT


async def test_a_stream_without_done_is_complete_if_it_tells_why_it_ends():
    last = {"choices": [{"index": 0, "text": "b", "finish_reason": "length"}]}

    outcome = await outcome_of(stream(event(token()), event(last)))

    assert outcome.failure is None
    assert outcome.num_output_tokens == 2


@pytest.mark.parametrize(("has_keep_alive", "num_connections"), [(True, 1), (False, 2)])
async def test_without_keep_alive_each_request_has_a_connection_of_its_own(has_keep_alive: bool, num_connections: int):
    connections: list[None] = []
    answer = stream(event(token(num_tokens=1)), DONE)
    async with (
        scripted_server([answer, answer], note_connection=lambda: connections.append(None)) as url,
        CompletionClient(url, model="tiny", has_keep_alive=has_keep_alive) as client,
    ):
        for _ in range(2):
            body = client.encode([1], num_tokens=1)
            outcome = await client.complete(body, num_prompt_tokens=1, num_tokens=1, due_s=0.0)
            assert outcome.failure is None
    assert len(connections) == num_connections
