import logging

import pytest

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.openai.middleware import choose_request_id
from tests.openai.asgi_call import call, get

BODY = {"prompt": "a", "max_tokens": 2}
ALL_ROUTES = [
    "/v1/models",
    "/v1/models/tiny",
    "/v1/completions",
    "/v1/chat/completions",
    "/tokenize",
    "/detokenize",
    "/tokenizer_info",
    "/metrics",
    "/openapi.json",
    "/nothing",
    "/healthy",
    "/",
]


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def test_a_short_printable_id_is_kept():
    assert choose_request_id("trace-1_A.b/c") == "trace-1_A.b/c"


@pytest.mark.parametrize("given", [None, "", "a" * 10_000, "a\r\nset-cookie: b", "a b", "\u00e9", "\x7f", "a\tb"])
def test_any_other_id_is_replaced(given):
    chosen = choose_request_id(given)

    assert chosen != given
    assert chosen.isalnum()


async def test_every_answer_has_the_clients_id_and_the_engine_never_sees_it(make_api):
    api = make_api()
    headers = {"x-request-id": "mine"}
    answers = [
        await call(api.app, "/v1/completions", BODY, headers=headers),
        await call(api.app, "/v1/completions", {**BODY, "stream": True}, headers=headers),
        await get(api.app, "/nothing", headers=headers),
    ]

    assert [answer.headers["x-request-id"] for answer in answers] == ["mine"] * 3
    assert all("mine" not in asked.request_id for asked in api.engine.asked)


async def test_two_requests_of_the_same_id_are_two(make_api):
    api = make_api()
    for _ in range(2):
        await call(api.app, "/v1/completions", BODY, headers={"x-request-id": "same"})

    first, second = (asked.request_id for asked in api.engine.asked)
    assert first != second


@pytest.mark.parametrize("path", ALL_ROUTES)
async def test_without_a_key_every_route_is_closed(make_api, path):
    api = make_api(config=IngressConfig(api_keys=("right",)))
    for method in ("GET", "POST", "OPTIONS"):
        answer = await call(api.app, path, BODY, method=method)

        assert (answer.status, answer.json()["error"]["code"]) == (401, "invalid_api_key")
        assert "x-request-id" in answer.headers
    assert api.engine.asked == []


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
async def test_health_needs_no_key(make_api, path):
    api = make_api(config=IngressConfig(api_keys=("right",)))

    assert (await get(api.app, path)).status == 200


@pytest.mark.parametrize(
    "authorization",
    ["Bearer wrong", "Bearer ", "Bearer", "", "Basic right", "right", "Bearer right2", "Bearer r\u00efght"],
)
async def test_a_wrong_key_is_no_key(make_api, authorization):
    api = make_api(config=IngressConfig(api_keys=("right", "other")))

    assert (await get(api.app, "/v1/models", headers={"authorization": authorization})).status == 401


@pytest.mark.parametrize("authorization", ["Bearer right", "bearer other", "BEARER  right "])
async def test_a_right_key_opens(make_api, authorization):
    api = make_api(config=IngressConfig(api_keys=("right", "other")))

    assert (await get(api.app, "/v1/models", headers={"authorization": authorization})).status == 200


async def test_keys_do_not_share_cached_prefixes(make_api):
    api = make_api(config=IngressConfig(api_keys=("one", "two")))
    for key in ("one", "two", "one"):
        await call(api.app, "/v1/completions", BODY, headers=bearer(key))

    salts = [asked.cache_salt for asked in api.engine.asked]
    assert salts[0] == salts[2] != salts[1]
    assert "one" not in salts[0]


async def test_without_admin_keys_there_is_no_trace(make_api):
    open_api, closed_api = make_api(), make_api(config=IngressConfig(api_keys=("user",)))

    assert (await get(open_api.app, "/debug/trace")).status == 404
    assert (await get(closed_api.app, "/debug/trace", headers=bearer("user"))).status == 404
    assert (await get(closed_api.app, "/debug/trace")).status == 401


@pytest.mark.parametrize("api_keys", [(), ("user",), ("user", "other")])
@pytest.mark.parametrize("headers", [{}, bearer("user"), bearer("adm"), {"authorization": "Basic admin"}])
async def test_only_an_admin_key_opens_the_trace(make_api, api_keys, headers):
    api = make_api(config=IngressConfig(api_keys=api_keys, admin_keys=("admin", "chief")))

    for method in ("GET", "HEAD"):
        answer = await call(api.app, "/debug/trace", b"", method=method, headers=headers)
        assert answer.status == 401
        assert "www-authenticate" in answer.headers
    assert (await get(api.app, "/debug/trace", headers=bearer("chief"))).status == 200


async def test_an_admin_key_opens_every_route_as_a_tenant_of_its_own(make_api):
    api = make_api(config=IngressConfig(api_keys=("user",), admin_keys=("admin",)))
    for key in ("user", "admin", "user"):
        assert (await call(api.app, "/v1/completions", BODY, headers=bearer(key))).status == 200

    salts = [asked.cache_salt for asked in api.engine.asked]
    assert salts[0] == salts[2] != salts[1]


async def test_admin_keys_alone_leave_the_other_routes_open(make_api):
    api = make_api(config=IngressConfig(admin_keys=("admin",)))

    assert (await get(api.app, "/v1/models")).status == 200
    assert (await get(api.app, "/v1/models", headers=bearer("wrong"))).status == 200


async def test_an_unforeseen_error_is_logged_with_its_id_and_not_told(make_api, caplog):
    api = make_api(raises=RuntimeError("/secret/path"))
    with caplog.at_level(logging.ERROR):
        answer = await call(api.app, "/v1/completions", BODY, headers={"x-request-id": "mine"})

    assert (answer.status, answer.json()["error"]["code"]) == (500, "internal_error")
    assert b"secret" not in answer.body
    assert "mine" in caplog.text
    assert "/secret/path" in caplog.text


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions"])
async def test_an_error_inside_a_stream_is_its_last_event_and_nothing_is_done(make_api, path):
    body = (
        {"stream": True, "messages": [{"role": "user", "content": "a"}]} if "chat" in path else {**BODY, "stream": True}
    )
    answer = await call(make_api(fails_after=1).app, path, body)

    chunk, error = answer.events()
    assert "choices" in chunk
    assert (error["error"]["type"], error["error"]["code"]) == ("server_error", "engine_error")
    assert b"secret" not in answer.body


async def test_an_error_before_the_stream_has_its_own_status(make_api):
    answer = await call(make_api(fails_after=0).app, "/v1/completions", {**BODY, "stream": True})

    assert answer.status == 500


async def test_prompts_are_not_logged(make_api, caplog):
    api = make_api(fails_after=0)
    with caplog.at_level(logging.DEBUG):
        await call(api.app, "/v1/completions", {"prompt": "my secret"})
        await call(api.app, "/v1/completions", {"prompt": "my secret", "temperature": -1})

    assert "my secret" not in caplog.text
