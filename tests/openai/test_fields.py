import pytest

from rayserve_sarathi.openai.errors import UnsupportedParameterError
from rayserve_sarathi.openai.fields import OFF_VALUES, keep_known_fields

KNOWN = {"model", "prompt", "temperature"}


@pytest.mark.parametrize(
    "body",
    [
        {"user": "me", "metadata": {"a": 1}, "service_tier": "auto", "safety_identifier": "x"},
        {"suffix": None, "tools": [], "tool_choice": "none", "response_format": {"type": "text"}},
        {"best_of": 1, "store": False, "modalities": ["text"]},
        dict.fromkeys(OFF_VALUES),
    ],
)
def test_what_does_not_change_the_answer_is_ignored(body):
    assert keep_known_fields({"prompt": "a", **body}, KNOWN) == {"prompt": "a"}


@pytest.mark.parametrize(
    "body",
    [
        {"best_of": 3},
        {"best_of": True},  # equal to 1 in Python, but not in JSON
        {"suffix": "end"},
        {"tools": [{"type": "function"}]},
        {"functions": [{}]},
        {"audio": {"voice": "x"}},
        {"modalities": ["text", "audio"]},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"pattern": "(a+)+$"}}},
        {"response_format": "junk"},
        {"use_beam_search": True},
        {"chat_template": "../../etc/passwd"},
    ],
)
def test_what_we_do_not_do_is_refused_by_name(body):
    (name,) = body
    with pytest.raises(UnsupportedParameterError, match=name) as caught:
        keep_known_fields(body, KNOWN)
    assert caught.value.param == name


def test_a_field_that_nobody_knows_is_refused_with_the_nearest_name():
    with pytest.raises(UnsupportedParameterError, match="did you mean temperature"):
        keep_known_fields({"temperatur": 1}, KNOWN)


def test_the_name_of_an_unknown_field_is_cut():
    with pytest.raises(UnsupportedParameterError) as caught:
        keep_known_fields({"x" * 10_000: 1}, KNOWN)
    assert len(str(caught.value)) < 400
