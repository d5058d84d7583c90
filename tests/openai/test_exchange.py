"""Bodies, deadlines and clients that leave, at the level of ASGI messages."""

import asyncio
import gzip
import json
import math

import pytest

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.openai.errors import ClientGoneError
from rayserve_sarathi.openai.exchange import EventStream
from tests.openai.asgi_call import AsgiCall, call
from tests.openai.scripted_engine import TIMEOUT_S

BODY = {"prompt": "a", "max_tokens": 4}
ROUTES = {"/v1/completions": BODY, "/v1/chat/completions": {"messages": [{"role": "user", "content": "a"}]}}

BAD_BODIES = {
    "empty": (b"", "invalid_json"),
    "truncated": (b'{"prompt": "a"', "invalid_json"),
    "trailing": (b'{"prompt": "a"} x', "invalid_json"),
    "null": (b"null", "invalid_value"),
    "list": (b"[]", "invalid_value"),
    "no field": (b"{}", "invalid_value"),
    "not utf-8": (b'{"prompt": "\xff"}', "invalid_json"),
    "half a surrogate pair": (b'{"prompt": "\\ud800"}', "invalid_json"),
    "byte order mark": (b'\xef\xbb\xbf{"prompt": "a"}', "invalid_json"),
    "utf-16": ('{"prompt": "a"}'.encode("utf-16"), "invalid_json"),
    "deep": (b'{"prompt": ' + b"[" * 100_000, "invalid_json"),
    "long number": (b'{"prompt": "a", "seed": ' + b"9" * 100_000 + b"}", "invalid_json"),
    "infinite": (b'{"prompt": "a", "temperature": 1e999}', "invalid_value"),
    "nan": (b'{"prompt": "a", "temperature": NaN}', "invalid_value"),
    "random bytes": (bytes(range(256)), "invalid_json"),
}


@pytest.mark.parametrize("name", BAD_BODIES)
async def test_a_bad_body_is_the_clients_mistake(make_api, name):
    body, code = BAD_BODIES[name]
    answer = await call(make_api().app, "/v1/completions", body)

    assert answer.status == 400
    assert answer.json()["error"]["code"] == code
    assert "x-request-id" in answer.headers


async def test_a_nul_character_is_text_and_the_last_of_two_equal_keys_counts(make_api):
    answer = await call(make_api().app, "/v1/completions", b'{"prompt": "\\u0000", "max_tokens": 1, "max_tokens": 2}')

    assert answer.json()["usage"]["completion_tokens"] == 2


async def test_a_body_that_declares_to_be_too_large_is_not_read(make_api):
    api = make_api(config=IngressConfig(max_body_bytes=1000))
    async with AsgiCall(
        api.app, "/v1/completions", parts=[b" "] * 100, headers={"content-length": "100000000"}
    ) as made:
        await made.finish()

    assert (made.status, made.json()["error"]["code"]) == (413, "request_too_large")
    assert made.num_parts_read == 0


async def test_a_body_without_length_is_read_no_further_than_the_limit(make_api):
    api = make_api(config=IngressConfig(max_body_bytes=1000))
    async with AsgiCall(api.app, "/v1/completions", parts=[b" " * 100] * 100_000) as made:
        await made.finish()

    assert made.status == 413
    assert made.num_parts_read == 11


@pytest.mark.parametrize(
    "headers",
    [
        {"content-type": "text/plain"},
        {"content-type": ""},
        {"content-type": "application/x-www-form-urlencoded"},
        {"content-type": "application/json; charset=utf-16"},
        {"content-encoding": "gzip"},
    ],
)
async def test_a_body_of_another_kind_is_refused_unread(make_api, headers):
    answer = await call(make_api().app, "/v1/completions", gzip.compress(json.dumps(BODY).encode()), headers=headers)

    assert (answer.status, answer.json()["error"]["code"]) == (415, "unsupported_media_type")
    assert answer.num_parts_read == 0


async def test_a_body_may_arrive_in_small_parts(make_api):
    parts = [bytes([byte]) for byte in json.dumps(BODY).encode()]
    async with AsgiCall(make_api().app, "/v1/completions", parts=parts) as made:
        await made.finish()

    assert made.status == 200


@pytest.mark.parametrize("path", ROUTES)
@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("n", [1, 3])
@pytest.mark.parametrize("hangs_after", [0, 2])
async def test_a_client_that_leaves_ends_its_requests(make_api, path, stream, n, hangs_after):
    api = make_api(hangs_after=hangs_after)
    async with AsgiCall(api.app, path, {**ROUTES[path], "stream": stream, "n": n}) as made:
        async with asyncio.timeout(TIMEOUT_S):
            await api.engine.is_hanging.wait()
        made.leave()
        await made.finish()

    assert (api.engine.num_open, api.engine.num_aborted) == (0, n)


async def test_five_hundred_clients_that_leave_at_once_leave_nothing_behind(make_api):
    api = make_api(hangs_after=1)
    calls = [AsgiCall(api.app, "/v1/completions", {**BODY, "stream": i % 2 == 0}) for i in range(500)]
    for made in calls:
        await made.__aenter__()
    await api.engine.wait_for_open(500)
    for made in calls:
        made.leave()
    for made in calls:
        await made.__aexit__(None, None, None)

    assert (api.engine.num_open, api.engine.num_aborted) == (0, 500)
    assert len(asyncio.all_tasks()) == 1


async def test_a_reader_that_stops_reading_holds_up_nobody_and_ends_with_its_deadline(make_api):
    api = make_api(max_model_len=1000)
    body = {"prompt": "a", "max_tokens": 900, "stream": True}
    async with AsgiCall(api.app, "/v1/completions", body, is_slow=True, headers=timeout(1)) as slow:
        await slow.wait_for_messages(2)
        assert (await call(api.app, "/v1/completions", BODY)).status == 200
        await api.engine.wait_for_open(0)

    assert api.engine.num_aborted == 1


async def test_a_client_that_reads_nothing_for_long_is_gone():
    async def chunks():
        try:
            while True:
                yield {"choices": []}
        finally:
            closed.set()

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if message["type"] == "http.response.body":
            await asyncio.Event().wait()

    closed = asyncio.Event()
    stream = EventStream(chunks(), until_s=math.inf, message="late", send_timeout_s=0.05)
    with pytest.raises(ClientGoneError, match=r"read nothing for 0\.05 s"):
        await stream({"type": "http"}, receive, send)
    assert closed.is_set()


@pytest.mark.parametrize(("generating_s", "reading_s", "send_timeout_s"), [(0.2, 0, 0.1), (0, 0.04, 0.6)])
async def test_neither_a_slow_engine_nor_a_slow_reader_is_a_client_that_is_gone(
    generating_s, reading_s, send_timeout_s
):
    async def chunks():
        for _ in range(num_chunks):
            await asyncio.sleep(generating_s)
            yield {"choices": []}

    async def receive():
        await asyncio.Event().wait()

    async def send(message):
        if reading_s:
            await asyncio.sleep(reading_s)
        sent.append(message)

    num_chunks = 3 if generating_s else 20
    sent = []
    stream = EventStream(chunks(), until_s=math.inf, message="late", send_timeout_s=send_timeout_s)
    await stream({"type": "http"}, receive, send)
    assert len(sent) == num_chunks + 2


async def test_what_a_client_sends_after_its_request_does_not_end_its_stream():
    async def chunks():
        await has_heard.wait()
        yield {"choices": []}

    async def receive():
        if not messages:
            has_heard.set()
            await asyncio.Event().wait()
        return messages.pop()

    async def send(message):
        sent.append(message)

    has_heard = asyncio.Event()
    messages = [{"type": "http.request", "body": b"more", "more_body": False}]
    sent = []
    await EventStream(chunks(), until_s=math.inf, message="late")({"type": "http"}, receive, send)
    assert len(sent) == 3


async def test_a_server_that_cannot_tell_whether_the_client_is_there_has_lost_it():
    async def chunks():
        await asyncio.Event().wait()
        yield {}

    async def receive():
        raise RuntimeError("the proxy is gone")

    async def send(message):
        sent.append(message)

    sent = []
    with pytest.raises(ClientGoneError):
        await EventStream(chunks(), until_s=math.inf, message="late")({"type": "http"}, receive, send)
    assert not sent


async def test_the_clients_deadline_holds_for_the_body_too(make_api):
    async def receive():
        await asyncio.Event().wait()

    headers = [(b"content-type", b"application/json"), (b"x-request-timeout-seconds", b"0.05")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "query_string": b"", "headers": headers}
    sent = []

    async def send(message):
        sent.append(message)

    async with asyncio.timeout(TIMEOUT_S):
        await make_api().app(scope, receive, send)

    assert sent[0]["status"] == 408


def timeout(timeout_s: object) -> dict[str, str]:
    return {"x-request-timeout-seconds": str(timeout_s)}


@pytest.mark.parametrize("stream", [True, False])
async def test_a_deadline_before_the_first_token_is_a_408_that_is_not_retried(make_api, stream):
    api = make_api(hangs_after=0)
    answer = await call(api.app, "/v1/completions", {**BODY, "stream": stream}, headers=timeout(0.05))

    assert (answer.status, answer.json()["error"]["type"]) == (408, "timeout")
    assert answer.headers["x-should-retry"] == "false"
    assert api.engine.num_open == 0


async def test_a_deadline_inside_a_stream_is_its_last_event(make_api):
    api = make_api(hangs_after=2)
    answer = await call(api.app, "/v1/completions", {**BODY, "stream": True}, headers=timeout(1))

    *chunks, last = answer.events()
    assert answer.status == 200
    assert len(chunks) == 2
    assert last["error"]["type"] == "timeout"
    assert api.engine.num_open == 0


async def test_the_servers_own_limit_holds_whatever_the_client_says(make_api):
    api = make_api(hangs_after=0, config=IngressConfig(request_timeout_s=0.05))

    assert (await call(api.app, "/v1/completions", BODY, headers=timeout(1000))).status == 408


@pytest.mark.parametrize("value", ["soon", "0", "-1", "nan", ""])
async def test_a_deadline_that_is_no_positive_number_is_refused(make_api, value):
    answer = await call(make_api().app, "/v1/completions", BODY, headers=timeout(value))

    assert answer.status == 400
    assert "x-request-timeout-seconds" in answer.json()["error"]["message"]


async def test_an_engine_that_runs_out_of_time_by_itself_is_not_the_clients_deadline(make_api):
    answer = await call(make_api(raises=TimeoutError("a stage")).app, "/v1/completions", BODY)

    assert answer.status == 500
