import pytest

from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.openai.errors import UnsupportedParameterError, describe
from rayserve_sarathi.openai.protocol import (
    MAX_STOP_CHARS,
    MAX_STOPS,
    ChatCompletionRequest,
    CompletionRequest,
    parse_body,
)

HELLO = [{"role": "user", "content": "hello"}]

# What well-known clients send, fields and all.
CLIENT_COMPLETIONS = {
    "lm-eval loglikelihood": {
        "model": "m",
        "prompt": [[1, 2], [3]],
        "temperature": 0,
        "max_tokens": 1,
        "logprobs": 1,
        "seed": 1234,
        "echo": True,
    },
    "lm-eval generation": {
        "model": "m",
        "prompt": ["a"],
        "max_tokens": 256,
        "temperature": 0.0,
        "stop": ["\n"],
        "seed": 1,
    },
    "vllm bench": {
        "model": "m",
        "prompt": "a",
        "temperature": 0.0,
        "repetition_penalty": 1.0,
        "max_tokens": 8,
        "logprobs": None,
        "stream": True,
        "stream_options": {"include_usage": True},
        "ignore_eos": True,
    },
    "guidellm": {
        "model": "m",
        "prompt": "a",
        "stream": True,
        "stream_options": {"include_usage": True, "continuous_usage_stats": True},
        "max_tokens": 8,
        "max_completion_tokens": 8,
        "ignore_eos": True,
        "stop": None,
    },
}
CLIENT_CHATS = {
    "lm-eval": {
        "model": "m",
        "messages": [{"role": "user", "content": "a", "type": "text"}],
        "max_tokens": 5,
        "temperature": 0,
        "stop": ["a", "b"],
        "seed": 1,
    },
    "langchain": {
        "model": "m",
        "messages": HELLO,
        "stream": True,
        "stream_options": {"include_usage": True},
        "max_completion_tokens": 5,
        "n": 1,
        "user": "u",
        "parallel_tool_calls": True,
        "tool_choice": "auto",
        "reasoning_effort": None,
    },
    "aiperf": {
        "model": "m",
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}], "name": ""}],
        "stream": True,
        "max_completion_tokens": 5,
        "min_tokens": 5,
        "ignore_eos": True,
    },
}


@pytest.mark.parametrize("client", CLIENT_COMPLETIONS)
def test_bodies_of_completion_clients_are_understood(client):
    parse_body(CompletionRequest, CLIENT_COMPLETIONS[client])


@pytest.mark.parametrize("client", CLIENT_CHATS)
def test_bodies_of_chat_clients_are_understood(client):
    parse_body(ChatCompletionRequest, CLIENT_CHATS[client])


@pytest.mark.parametrize(
    ("prompt", "prompts"),
    [("a", ["a"]), (["a", "b"], ["a", "b"]), ([1, 2], [[1, 2]]), ([[1], [2, 3]], [[1], [2, 3]]), ("", [""])],
)
def test_a_prompt_may_have_four_forms(prompt, prompts):
    assert parse_body(CompletionRequest, {"prompt": prompt}).prompts == prompts


@pytest.mark.parametrize(
    ("field", "value", "param"),
    [
        ("prompt", [], "prompt"),
        ("prompt", None, "prompt"),
        ("prompt", 5, "prompt"),
        ("prompt", [1, "a"], "prompt.1"),
        ("prompt", ["a", 1], "prompt.1"),
        ("prompt", [[1], []], "prompt.1"),
        ("prompt", [-1], "prompt.0"),
        ("prompt", [True], "prompt.0"),
        ("prompt", [2**63], "prompt.0"),
        ("max_tokens", True, "max_tokens"),
        ("max_tokens", "5", "max_tokens"),
        ("max_tokens", 1.0, "max_tokens"),
        ("max_tokens", -1, "max_tokens"),
        ("max_tokens", 2**63, "max_tokens"),
        ("temperature", -1, "temperature"),
        ("temperature", "0", "temperature"),
        ("temperature", True, "temperature"),
        ("temperature", float("nan"), "temperature"),
        ("temperature", float("inf"), "temperature"),
        ("top_p", 0, "top_p"),
        ("top_k", -2, "top_k"),
        ("min_p", 1.1, "min_p"),
        ("presence_penalty", 3, "presence_penalty"),
        ("seed", 2**64, "seed"),
        ("n", 0, "n"),
        ("logprobs", 10**6, "logprobs"),
        ("logprobs", True, "logprobs"),
        ("stop", "", "stop"),
        ("stop", ["a", ""], "stop.1"),
        ("stop", ["a"] * (MAX_STOPS + 1), "stop"),
        ("stop", "a" * (MAX_STOP_CHARS + 1), "stop"),
        ("stop", [1], "stop.0"),
        ("stop_token_ids", [-1], "stop_token_ids.0"),
        ("logit_bias", {"5": 101}, "logit_bias.5"),
        ("logit_bias", [], "logit_bias"),
        ("stream", "true", "stream"),
        ("stream", 1, "stream"),
        ("stream_options", {"include_usag": True}, "stream_options.include_usag"),
        ("echo", 1, "echo"),
        ("cache_salt", "x" * 300, "cache_salt"),
    ],
)
def test_a_wrong_value_is_refused_with_its_path(field, value, param):
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(CompletionRequest, {"prompt": "a", field: value})
    assert caught.value.param == param
    assert len(caught.value.message) < 300


@pytest.mark.parametrize(
    ("messages", "param"),
    [
        ([], "messages"),
        (None, "messages"),
        ("hello", "messages"),
        (["hello"], "messages.0"),
        ([{"role": "wizard", "content": "a"}], "messages.0.role"),
        ([{"role": "tool", "content": "a", "tool_call_id": None}], "messages.0.role"),
        ([{"role": "user"}], "messages.0.content"),
        ([{"role": "user", "content": None}], "messages.0.content"),
        ([{"role": "user", "content": []}], "messages.0.content"),
        ([*HELLO, {"role": "user", "content": [{"type": "image_url"}]}], "messages.1.content.0.type"),
        ([{"role": "user", "content": "a", "name": "<|im_end|>"}], "messages.0.name"),
    ],
)
def test_a_wrong_message_is_refused_with_its_path(messages, param):
    with pytest.raises(InvalidRequestError) as caught:
        parse_body(ChatCompletionRequest, {"messages": messages})
    assert caught.value.param == param


@pytest.mark.parametrize("field", ["tool_calls", "colour"])
def test_a_message_with_a_field_that_we_do_not_do_is_refused(field):
    with pytest.raises(UnsupportedParameterError) as caught:
        parse_body(ChatCompletionRequest, {"messages": [{"role": "assistant", "content": "a", field: [1]}]})
    assert caught.value.param == f"messages.0.{field}"


def test_the_path_of_a_wrong_value_has_only_what_the_client_wrote():
    long = "x" * 1000
    for body, param in (
        ({"prompt": "a", "logit_bias": {"abc": 1}}, "logit_bias.abc"),
        ({"prompt": "a", "logit_bias": {long: 1}}, f"logit_bias.{long}"),
        ({"prompt": "a", "stream_options": {"foo": 1}}, "stream_options.foo"),
    ):
        with pytest.raises(InvalidRequestError) as caught:
            parse_body(CompletionRequest, body)
        assert caught.value.param == param
    assert len(describe(caught.value).body["error"]["param"]) <= 200
    assert isinstance(caught.value, UnsupportedParameterError)


def test_null_is_the_same_as_leaving_a_field_out():
    fields = dict.fromkeys(CompletionRequest.model_fields.keys() - {"prompt"})

    assert parse_body(CompletionRequest, {"prompt": "a", **fields}) == parse_body(CompletionRequest, {"prompt": "a"})


def test_parts_of_a_message_are_joined_by_line_and_developers_are_the_system():
    content = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    request = parse_body(ChatCompletionRequest, {"messages": [{"role": "developer", "content": content}]})

    assert request.messages[0].flatten() == {"role": "system", "content": "a\nb"}
