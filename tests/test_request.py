"""What a request may ask for."""

import math
from typing import Any

import pytest

from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.request import SamplingParams


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 1.5),
        ("max_tokens", True),
        ("max_tokens", "5"),
        ("max_tokens", -1),
        ("top_k", 1.5),
        ("seed", 1.5),
        ("seed", 2**64),
        ("logprobs", True),
        ("prompt_logprobs", 21),
        ("temperature", True),
        ("temperature", math.nan),
        ("temperature", None),
        ("top_p", 0.0),
        ("min_p", math.inf),
        ("repetition_penalty", 1e-50),
        ("repetition_penalty", 0.0),
        ("ignore_eos", "no"),
        ("stop_token_ids", 5),
        ("stop_token_ids", (5.5,)),
        ("stop_token_ids", (-1,)),
        ("logit_bias", {5: 1.0}),
        ("logit_bias", ((5.7, 1.0),)),
        ("logit_bias", ((5, math.nan),)),
        ("logit_bias", ((5, 101.0),)),
    ],
)
def test_a_value_that_means_nothing_is_refused_by_name(name: str, value: Any):
    with pytest.raises(InvalidRequestError, match=name) as caught:
        SamplingParams(**{name: value})

    assert caught.value.param == name


def test_whole_numbers_do_where_fractions_may_stand():
    assert SamplingParams(temperature=0, top_p=1, logit_bias=((5, 1),)).temperature == 0
