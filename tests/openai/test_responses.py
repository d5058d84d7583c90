"""Answers have the shapes that the schema promises."""

import pytest

from rayserve_sarathi.openai import responses
from tests.openai.asgi_call import call, get

CHAT = {"messages": [{"role": "user", "content": "a"}], "max_tokens": 3}
ANSWERS = [
    (responses.CompletionResponse, "/v1/completions", {"prompt": "a", "logprobs": 2, "echo": True, "n": 2}),
    (responses.CompletionResponse, "/v1/completions", {"prompt": "a", "stop": "t"}),
    (responses.ChatCompletionResponse, "/v1/chat/completions", CHAT),
    (responses.ChatCompletionResponse, "/v1/chat/completions", {**CHAT, "logprobs": True, "top_logprobs": 2}),
    (responses.TokenizeResponse, "/tokenize", {"prompt": "a", "return_token_strs": True}),
    (responses.DetokenizeResponse, "/detokenize", {"tokens": [5]}),
    (responses.ErrorResponse, "/v1/completions", {}),
    (responses.ErrorResponse, "/nothing", {}),
    (responses.ModelListResponse, "/v1/models", None),
    (responses.ModelResponse, "/v1/models/tiny", None),
    (responses.TokenizerInfoResponse, "/tokenizer_info", None),
    (responses.HealthResponse, "/health", None),
]


@pytest.mark.parametrize(("shape", "path", "body"), ANSWERS)
async def test_answers_have_the_shape_that_the_schema_promises(make_api, shape, path, body):
    app = make_api().app
    answer = await get(app, path) if body is None else await call(app, path, body)

    shape.model_validate(answer.json())
