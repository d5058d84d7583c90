import pickle

import pytest
from starlette.exceptions import HTTPException

from rayserve_sarathi.errors import (
    ConfigError,
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
)
from rayserve_sarathi.openai.errors import (
    DeadlineError,
    EngineFailureError,
    HttpError,
    ModelNotFoundError,
    UnsupportedParameterError,
    describe,
)

TABLE = [
    (HttpError.invalid_json("at line 1"), 400, "invalid_request_error", "invalid_json"),
    (HttpError.unsupported_media_type("no"), 415, "invalid_request_error", "unsupported_media_type"),
    (HttpError.request_too_large(10), 413, "invalid_request_error", "request_too_large"),
    (HttpError.invalid_api_key(), 401, "invalid_request_error", "invalid_api_key"),
    (HttpError.no_admin_key(), 401, "invalid_request_error", "invalid_api_key"),
    (InvalidRequestError("no", param="n"), 400, "invalid_request_error", "invalid_value"),
    (UnsupportedParameterError("no", param="n"), 400, "invalid_request_error", "unsupported_parameter"),
    (ModelNotFoundError("no"), 404, "invalid_request_error", "model_not_found"),
    (ContextLengthError("no"), 400, "invalid_request_error", "context_length_exceeded"),
    (OverloadedError("full", retry_after_s=0.2), 429, "rate_limit_error", "server_overloaded"),
    (EngineDeadError("starting"), 503, "service_unavailable", "service_unavailable"),
    (DeadlineError("late"), 408, "timeout", "timeout"),
    (EngineFailureError("no"), 500, "server_error", "engine_error"),
    (HTTPException(404), 404, "invalid_request_error", "not_found"),
    (HTTPException(405), 405, "invalid_request_error", "method_not_allowed"),
    (RuntimeError("no"), 500, "server_error", "internal_error"),
    (ConfigError("no"), 500, "server_error", "internal_error"),
]


@pytest.mark.parametrize(("error", "status", "kind", "code"), TABLE, ids=[f"{row[1]}-{row[3]}" for row in TABLE])
def test_every_error_has_one_shape(error, status, kind, code):
    answer = describe(error)

    assert answer.status == status
    assert set(answer.body) == {"error"}
    detail = answer.body["error"]
    assert set(detail) == {"message", "type", "param", "code"}
    assert (detail["type"], detail["code"]) == (kind, code)


def test_clients_are_told_when_to_come_back():
    assert describe(OverloadedError("full", retry_after_s=2.1)).headers["retry-after"] == "3"
    assert describe(OverloadedError("full", retry_after_s=0)).headers["retry-after"] == "1"
    assert int(describe(EngineDeadError("starting")).headers["retry-after"]) > 0
    assert describe(DeadlineError("late")).headers["x-should-retry"] == "false"


@pytest.mark.parametrize("error", [RuntimeError("/secret/path"), EngineFailureError("Traceback: /secret/path")])
def test_faults_of_ours_tell_nothing_about_us(error):
    assert "secret" not in str(describe(error).body)


def test_only_the_first_line_of_an_engines_death_is_told():
    assert "secret" not in str(describe(EngineDeadError("draining\nTraceback: /secret/path")).body)


@pytest.mark.parametrize("error", [UnsupportedParameterError("no", param="n"), ModelNotFoundError("no")])
def test_a_clients_mistake_survives_a_handle_call(error):
    copy = pickle.loads(pickle.dumps(error))

    assert type(copy) is type(error)
    assert (copy.message, copy.param) == (error.message, error.param)


@pytest.mark.parametrize(
    "error", [HttpError.request_too_large(10), HttpError.unsupported_media_type("no"), DeadlineError("late")]
)
def test_an_answer_to_a_body_that_is_not_read_closes_the_connection(error):
    assert describe(error).headers["connection"] == "close"
