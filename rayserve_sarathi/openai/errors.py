"""Every error that a client of the HTTP API can get: its exception, status, body and headers.

`describe` is the only place where an exception becomes an answer, before a stream begins or inside it.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

from starlette.exceptions import HTTPException
from starlette.responses import Response

from rayserve_sarathi.errors import (
    ContextLengthError,
    EngineDeadError,
    InvalidRequestError,
    OverloadedError,
    SarathiError,
)
from rayserve_sarathi.openai.json_encoder import encode_json

_UNAVAILABLE_RETRY_AFTER_S = 5
_MAX_MESSAGE_CHARS = 2000
_MAX_PARAM_CHARS = 200
_CLOSE = {"connection": "close"}
"""For an answer that does not wait for the rest of the body."""


class UnsupportedParameterError(InvalidRequestError):
    """The client asks for something that this server does not do."""


class ModelNotFoundError(InvalidRequestError):
    """The client names a model that is not served here."""

    def __init__(self, message: str, *, param: str | None = "model") -> None:
        super().__init__(message, param=param)


class EngineFailureError(SarathiError):
    """The engine failed on one request; the message is for the log, not for the client."""


class DeadlineError(SarathiError):
    """A request took longer than its client, or the server, lets it."""


class ClientGoneError(SarathiError):
    """The client closed its connection; nobody is left to read an answer."""


class HttpError(SarathiError):
    """A request that fails as HTTP, before what it asks for is looked at."""

    def __init__(self, status: int, message: str, *, code: str, headers: Mapping[str, str] | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.headers = dict(headers or {})

    @classmethod
    def invalid_json(cls, problem: str) -> "HttpError":
        """The body is not JSON."""
        return cls(400, f"the body is not valid JSON: {problem}", code="invalid_json")

    @classmethod
    def not_an_object(cls) -> "HttpError":
        """The body is JSON, but no object."""
        return cls(400, "the body must be a JSON object", code="invalid_value")

    @classmethod
    def unsupported_media_type(cls, problem: str) -> "HttpError":
        """The body is of the wrong kind."""
        return cls(415, problem, code="unsupported_media_type", headers=_CLOSE)

    @classmethod
    def request_too_large(cls, max_body_bytes: int) -> "HttpError":
        """The body is larger than the server reads."""
        message = f"the body is larger than {max_body_bytes} bytes"
        return cls(413, message, code="request_too_large", headers=_CLOSE)

    @classmethod
    def invalid_api_key(cls) -> "HttpError":
        """No key, or a wrong one."""
        message = "missing or wrong API key; send it as 'Authorization: Bearer <key>'"
        return cls(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    @classmethod
    def no_admin_key(cls) -> "HttpError":
        """A key that opens other routes, or none, where an admin key is needed."""
        message = "this path needs an admin key; send one of ingress.admin_keys as 'Authorization: Bearer <key>'"
        return cls(401, message, code="invalid_api_key", headers={"www-authenticate": "Bearer"})

    @classmethod
    def invalid_header(cls, problem: str) -> "HttpError":
        """A header has a value that means nothing."""
        return cls(400, problem, code="invalid_value")


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorAnswer:
    """What a client gets."""

    status: int
    message: str
    type: str
    code: str
    param: str | None = None
    headers: Mapping[str, str] = field(default_factory=dict)

    @property
    def body(self) -> dict[str, object]:
        """The JSON that says so, as an answer's body or an event of a stream."""
        message = self.message[:_MAX_MESSAGE_CHARS]
        param = None if self.param is None else self.param[:_MAX_PARAM_CHARS]
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}

    def to_response(self) -> Response:
        """Return it as the whole answer."""
        return Response(encode_json(self.body), self.status, headers=dict(self.headers), media_type="application/json")


def describe(error: Exception) -> ErrorAnswer:
    """Return what the client is told; an error that nobody foresaw tells it nothing."""
    match error:
        case InvalidRequestError():
            return _describe_invalid_request(error)
        case HttpError():
            return ErrorAnswer(
                status=error.status,
                message=error.message,
                type="invalid_request_error",
                code=error.code,
                headers=error.headers,
            )
        case HTTPException():
            return _describe_routing(error)
        case OverloadedError():
            return ErrorAnswer(
                status=429,
                message=error.message,
                type="rate_limit_error",
                code="server_overloaded",
                headers={"retry-after": str(max(1, math.ceil(error.retry_after_s)))},
            )
        case EngineDeadError():
            return ErrorAnswer(
                status=503,
                message="no pipeline is ready: " + (str(error).splitlines() or ["starting, draining or restarting"])[0],
                type="service_unavailable",
                code="service_unavailable",
                headers={"retry-after": str(_UNAVAILABLE_RETRY_AFTER_S)},
            )
        case DeadlineError():
            headers = {"x-should-retry": "false", **_CLOSE}
            return ErrorAnswer(status=408, message=str(error), type="timeout", code="timeout", headers=headers)
        case ClientGoneError():
            return ErrorAnswer(status=499, message="the client is gone", type="client_gone", code="client_gone")
        case EngineFailureError():
            message = "the engine failed on this request"
            return ErrorAnswer(status=500, message=message, type="server_error", code="engine_error")
        case _:
            return ErrorAnswer(status=500, message="internal error", type="server_error", code="internal_error")


def _describe_invalid_request(error: InvalidRequestError) -> ErrorAnswer:
    status, code = 400, "invalid_value"
    match error:
        case ContextLengthError():
            code = "context_length_exceeded"
        case UnsupportedParameterError():
            code = "unsupported_parameter"
        case ModelNotFoundError():
            status, code = 404, "model_not_found"
    return ErrorAnswer(status=status, message=error.message, type="invalid_request_error", code=code, param=error.param)


def _describe_routing(error: HTTPException) -> ErrorAnswer:
    messages = {
        404: ("there is nothing at this path; see /openapi.json", "not_found"),
        405: ("this path does not take this method; see the Allow header", "method_not_allowed"),
    }
    message, code = messages.get(error.status_code, ("the request cannot be handled", "invalid_value"))
    return ErrorAnswer(
        status=error.status_code,
        message=message,
        type="invalid_request_error",
        code=code,
        headers=error.headers or {},
    )
