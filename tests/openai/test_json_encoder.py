import json
import math

import pytest

from rayserve_sarathi.openai.json_encoder import encode_json
from rayserve_sarathi.request import FinishReason


@pytest.mark.parametrize(
    "value",
    [
        {"text": 'a "quote", \\, \n, \0, \u2028, \u4f60 and \U0001f600', "choices": []},
        {"logprob": -1.5e-7, "large": 10**18, "list": [1, None, True], "nested": {"a": {}}},
    ],
)
def test_json_comes_back_as_it_was(value):
    assert json.loads(encode_json(value)) == value


def test_json_is_compact_and_in_utf8():
    answer = {"text": "\u4f60", "finish_reason": FinishReason.STOP, "choices": []}

    assert encode_json(answer) == '{"text":"\u4f60","finish_reason":"stop","choices":[]}'.encode()


@pytest.mark.parametrize("number", [math.nan, math.inf, -math.inf])
def test_a_number_that_json_does_not_know_is_null(number):
    assert encode_json([number]) == b"[null]"
