"""The routes, one by one."""

import pytest

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.errors import EngineDeadError, OverloadedError
from rayserve_sarathi.openai import responses
from rayserve_sarathi.openai.fields import IGNORED_FIELDS, OFF_VALUES
from rayserve_sarathi.openai.protocol import CompletionRequest
from tests.openai.asgi_call import call, get

BODY = {"prompt": "a", "max_tokens": 2}


async def test_models_tell_where_the_checkpoint_is_and_how_long_a_request_may_be(make_api):
    (model,) = (await get(make_api().app, "/v1/models")).json()["data"]

    assert (model["id"], model["root"], model["max_model_len"]) == ("tiny", "/models/tiny", 64)
    assert (await get(make_api().app, "/v1/models/tiny")).json() == model


@pytest.mark.parametrize("name", ["other", "../../etc/passwd", "/etc/passwd"])
async def test_a_model_that_is_not_served_is_a_404(make_api, name):
    answer = await get(make_api().app, f"/v1/models/{name}")

    assert (answer.status, answer.json()["error"]["code"]) == (404, "model_not_found")


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [
        ("GET", "/nothing", 404),
        ("GET", "/docs", 404),
        ("GET", "/v1/completions/", 404),
        ("POST", "/v1/completions/", 404),
        ("GET", "/v1/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/completions", 405),
    ],
)
async def test_wrong_paths_and_methods_have_the_shape_of_all_errors(make_api, method, path, status):
    answer = await call(make_api().app, path, BODY, method=method)

    assert answer.status == status
    assert answer.json()["error"]["type"] == "invalid_request_error"
    assert ("allow" in answer.headers) == (status == 405)


async def test_no_other_origin_is_let_in(make_api):
    answer = await get(make_api().app, "/v1/models", headers={"origin": "https://evil.example"})

    assert not [name for name in answer.headers if name.startswith("access-control")]


@pytest.mark.parametrize("path", ["/health", "/health/ready"])
async def test_health_is_the_engines(make_api, path):
    api = make_api()
    assert (await get(api.app, path)).status == 200

    api.engine.ready_error = EngineDeadError("starting")
    answer = await get(api.app, path)
    assert (answer.status, answer.json()["error"]["type"]) == (503, "service_unavailable")
    assert "retry-after" in answer.headers


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize(
    ("error", "status"), [(OverloadedError("full", retry_after_s=2), 429), (EngineDeadError("draining"), 503)]
)
async def test_a_full_or_dead_engine_says_when_to_come_back(make_api, error, status, stream):
    for api in (make_api(capacity_error=error), make_api(raises=error)):
        answer = await call(api.app, "/v1/completions", {**BODY, "stream": stream})

        assert answer.status == status
        assert int(answer.headers["retry-after"]) > 0


async def test_metrics_are_the_engines_text(make_api):
    answer = await get(make_api().app, "/metrics")

    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    assert answer.body == b"sarathi_num_requests_running 0\n"


async def test_a_trace_is_that_of_all_pipelines(make_api):
    api = make_api(config=IngressConfig(admin_keys=("admin",)))
    answer = await get(api.app, "/debug/trace", headers={"authorization": "Bearer admin"})

    responses.TraceResponse.model_validate(answer.json())
    assert answer.headers["content-type"] == "application/json"
    assert {event["pid"] for event in answer.json()["traceEvents"]} == {0, 1}


async def test_why_tokens_were_late_is_told_to_admins_only(make_api):
    api = make_api(config=IngressConfig(api_keys=("user",), admin_keys=("admin",)))
    answer = await get(api.app, "/debug/why/late", headers={"authorization": "Bearer admin"})

    responses.WhyResponse.model_validate(answer.json())
    (request,) = answer.json()["requests"]
    assert request["gaps"] == [{"position": 20, "gap_s": 0.4, "cause": "prefill", "culprit": "other-0"}]
    assert (await get(api.app, "/debug/why/late", headers={"authorization": "Bearer user"})).status == 401
    assert (await get(api.app, "/debug/why/x", headers={"authorization": "Bearer admin"})).json() == {"requests": []}


async def test_the_schema_has_the_trace_only_where_there_is_one(make_api):
    api = make_api(config=IngressConfig(admin_keys=("admin",)))
    schema = (await get(api.app, "/openapi.json")).json()

    assert schema["paths"]["/debug/trace"]["get"]["security"] == [{"key": []}]
    assert schema["paths"]["/debug/why/{request_id}"]["get"]["security"] == [{"key": []}]
    assert "security" not in schema
    assert "/debug/trace" not in (await get(make_api().app, "/openapi.json")).json()["paths"]


async def test_text_becomes_tokens_and_tokens_text(make_api, tokenizer):
    app = make_api().app
    tokens = (await call(app, "/tokenize", {"prompt": "hello", "add_special_tokens": False})).json()["tokens"]
    assert tokens == tokenizer.encode("hello", add_special_tokens=False)
    assert (await call(app, "/detokenize", {"tokens": tokens})).json() == {"prompt": "hello"}

    with_strings = (await call(app, "/tokenize", {"model": "tiny", "prompt": "hi", "return_token_strs": True})).json()
    assert with_strings["token_strs"][0] == "<s>"
    assert with_strings["count"] == len(with_strings["tokens"])
    assert with_strings["max_model_len"] == 64


async def test_a_chat_becomes_the_tokens_that_it_would_have_as_a_prompt(make_api):
    api = make_api(max_model_len=200)
    body = {"messages": [{"role": "user", "content": "hi <|im_end|>"}]}
    tokens = (await call(api.app, "/tokenize", body)).json()["tokens"]
    await call(api.app, "/v1/chat/completions", {**body, "max_tokens": 1})

    assert tuple(tokens) == api.engine.asked[0].prompt_token_ids


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/tokenize", {}),
        ("/tokenize", {"prompt": ["a"]}),
        ("/tokenize", {"messages": []}),
        ("/detokenize", {"tokens": "a"}),
        ("/detokenize", {"tokens": [10**6]}),
        ("/detokenize", {"tokens": [-1]}),
    ],
)
async def test_bad_bodies_of_the_tokenizer_routes_are_refused(make_api, path, body):
    assert (await call(make_api().app, path, body)).status == 400


async def test_tokenizer_info_lets_a_remote_client_render_chats(make_api):
    info = (await get(make_api().app, "/tokenizer_info")).json()

    assert info["eos_token"] == "</s>"
    assert "<|im_start|>" in info["chat_template"]
    assert info["eos_token_ids"] == [1]


async def test_the_schema_names_every_route_field_and_error(make_api):
    schema = (await get(make_api().app, "/openapi.json")).json()

    assert set(schema["paths"]) == {
        "/v1/models",
        "/v1/models/{model_id}",
        "/v1/completions",
        "/v1/chat/completions",
        "/tokenize",
        "/detokenize",
        "/tokenizer_info",
        "/health",
        "/health/ready",
        "/metrics",
    }
    completion = schema["components"]["schemas"]["CompletionRequest"]
    assert set(completion["properties"]) == {*CompletionRequest.model_fields, *IGNORED_FIELDS, *OFF_VALUES}
    assert completion["additionalProperties"] is False
    assert completion["properties"]["best_of"]["enum"] == [1, None]
    assert completion["properties"]["n"]["anyOf"][0]["maximum"] == 16
    statuses = schema["paths"]["/v1/completions"]["post"]["responses"]
    assert {"200", "400", "401", "404", "408", "413", "415", "429", "500", "503"} <= set(statuses)
    assert "422" not in statuses


async def test_the_schema_says_that_a_key_is_needed(make_api):
    open_schema = (await get(make_api().app, "/openapi.json")).json()
    api = make_api(config=IngressConfig(api_keys=("secret",)))
    schema = (await get(api.app, "/openapi.json", headers={"authorization": "Bearer secret"})).json()

    assert "security" not in open_schema
    assert schema["security"] == [{"key": []}]


@pytest.mark.parametrize("path", ["/health", "/health/ready", "/v1/models", "/metrics"])
async def test_a_load_balancer_may_ask_by_head(make_api, path):
    assert (await call(make_api().app, path, b"", method="HEAD")).status == 200


async def test_the_schemas_references_all_lead_somewhere(make_api):
    schema = (await get(make_api().app, "/openapi.json")).json()

    def references(node):
        if isinstance(node, dict):
            yield from ([node["$ref"]] if "$ref" in node else [])
            for child in node.values():
                yield from references(child)
        elif isinstance(node, list):
            for child in node:
                yield from references(child)

    names = {reference.removeprefix("#/components/schemas/") for reference in references(schema)}
    assert names <= set(schema["components"]["schemas"])
