import pytest

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.errors import ContextLengthError, InvalidRequestError
from rayserve_sarathi.openai.errors import EngineFailureError, ModelNotFoundError

TEXT = "one, two, three"


async def texts(api, body):
    return [choice["text"] for choice in (await api.service.completions(body))["choices"]]


async def chunks_of(api, body):
    return [chunk async for chunk in api.service.stream_completions(body)]


async def test_sixteen_tokens_are_the_default(make_api):
    answer = await make_api().service.completions({"prompt": "a"})

    assert answer["usage"]["completion_tokens"] == 16
    assert answer["choices"][0]["finish_reason"] == "length"


async def test_the_default_shrinks_to_what_is_left_of_the_context(make_api):
    answer = await make_api(max_model_len=10).service.completions({"prompt": [5] * 7})

    assert answer["usage"]["completion_tokens"] == 3


@pytest.mark.parametrize(("num_prompt_tokens", "fits"), [(63, True), (64, False), (65, False)])
async def test_a_prompt_must_leave_room_for_a_token(make_api, num_prompt_tokens, fits):
    body = {"prompt": [5] * num_prompt_tokens, "max_tokens": 1}
    if fits:
        assert len(await texts(make_api(), body)) == 1
    else:
        with pytest.raises(ContextLengthError, match="This model's maximum context length is 64 tokens"):
            await texts(make_api(), body)


async def test_the_token_that_ends_a_request_is_counted_but_not_shown(make_api):
    api = make_api(TEXT, ends=True)
    answer = await api.service.completions({"prompt": "a", "skip_special_tokens": False})

    assert answer["choices"][0]["text"] == TEXT
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(api.engine.token_ids)
    shown = await texts(
        make_api(TEXT, ends=True), {"prompt": "a", "skip_special_tokens": False, "include_stop_str_in_output": True}
    )
    assert shown == [TEXT + "</s>"]


async def test_a_stop_token_is_named_as_the_reason(make_api, tokenizer):
    api = make_api(TEXT, ends=True)
    end = api.engine.token_ids[-1]
    answer = await api.service.completions({"prompt": "a", "stop_token_ids": [end]})

    assert answer["choices"][0]["stop_reason"] == end


@pytest.mark.parametrize("tokens_per_output", [1, 3, 100])
async def test_a_stop_string_cuts_the_text_and_aborts_the_request(make_api, tokens_per_output):
    api = make_api(TEXT, tokens_per_output=tokens_per_output)
    answer = await api.service.completions({"prompt": "a", "max_tokens": 50, "stop": [", t", "never"]})

    choice = answer["choices"][0]
    assert (choice["text"], choice["finish_reason"], choice["stop_reason"]) == ("one", "stop", ", t")
    assert answer["usage"]["completion_tokens"] < 15
    assert api.engine.num_open == 0


async def test_a_stop_string_equal_to_the_whole_output_leaves_nothing(make_api):
    assert await texts(make_api(TEXT), {"prompt": "a", "max_tokens": 50, "stop": TEXT}) == [""]


async def test_streamed_text_is_the_text_of_the_whole_answer(make_api):
    text = "\U0001f468\u200d\U0001f469 \u4f60\u597d e\u0301 \U0001f600"
    body = {"prompt": "a", "max_tokens": 43, "stop": ["\u597d e\u0301 x"]}
    whole = await texts(make_api(text), body)

    streamed = "".join(chunk["choices"][0]["text"] for chunk in await chunks_of(make_api(text), body))

    assert [streamed] == whole


async def test_choices_are_in_order_and_prompts_are_counted_once(make_api):
    api = make_api(num_cached_tokens=2)
    answer = await api.service.completions({"prompt": [[5, 6, 7], [8]], "n": 2, "max_tokens": 3})

    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2, 3]
    assert [asked.prompt_token_ids for asked in api.engine.asked] == [(5, 6, 7), (5, 6, 7), (8,), (8,)]
    assert len({asked.request_id for asked in api.engine.asked}) == 4
    assert answer["usage"] == {
        "prompt_tokens": 4,
        "completion_tokens": 12,
        "total_tokens": 16,
        "prompt_tokens_details": {"cached_tokens": 4},
    }


async def test_the_first_choice_has_the_seed_itself_and_the_others_their_own(make_api):
    async def seeds(body):
        api = make_api()
        await api.service.completions(body)
        return [asked.sampling.seed for asked in api.engine.asked]

    three = await seeds({"prompt": ["a", "b"], "n": 3, "seed": 7})

    assert three[0] == 7
    assert len(set(three[:3])) == 3
    assert three[:3] == three[3:]  # as each prompt would have alone
    assert await seeds({"prompt": "a", "seed": 7}) == [7]
    assert await seeds({"prompt": "a", "seed": -1}) == [2**64 - 1]


async def test_requests_without_a_seed_differ(make_api):
    api = make_api()
    for _ in range(2):
        await api.service.completions({"prompt": "a"})

    first, second = (asked.sampling.seed for asked in api.engine.asked)
    assert first != second


async def test_sampling_fields_reach_the_engine(make_api):
    api = make_api()
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 5,
        "min_p": 0.1,
        "presence_penalty": 1,
        "frequency_penalty": -1,
        "repetition_penalty": 1.5,
        "min_tokens": 2,
        "ignore_eos": True,
    }
    body = {"prompt": "a", "logit_bias": {"7": -100}, "stop_token_ids": [9], "cache_salt": "mine", **fields}
    await api.service.completions(body)

    (asked,) = api.engine.asked
    assert {name: getattr(asked.sampling, name) for name in fields} == fields
    assert (asked.sampling.logit_bias, asked.sampling.stop_token_ids) == (((7, -100.0),), (9,))
    assert asked.cache_salt == "mine"


@pytest.mark.parametrize("top_k", [0, -1, None])
async def test_top_k_has_three_ways_of_being_off(make_api, top_k):
    api = make_api()
    await api.service.completions({"prompt": "a", "top_k": top_k})

    assert api.engine.asked[0].sampling.top_k == 0


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": [10**6]}, "prompt"),
        ({"stop_token_ids": [10**6]}, "stop_token_ids"),
        ({"logit_bias": {"1000000": 1}}, "logit_bias"),
        ({"n": 17}, "n"),
        ({"prompt": ["a"] * 5}, "prompt"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"min_tokens": 5, "max_tokens": 4}, "min_tokens"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "a\ud800"}, None),
        ({"prompt": "", "add_special_tokens": False}, "prompt"),
    ],
)
async def test_what_this_model_cannot_do_is_refused(make_api, fields, param):
    api = make_api(config=IngressConfig(max_prompts_per_request=4))
    with pytest.raises(InvalidRequestError) as caught:
        await api.service.completions({"prompt": "a", **fields})

    assert caught.value.param == param
    assert api.engine.asked == []


async def test_another_models_name_is_refused(make_api):
    with pytest.raises(ModelNotFoundError, match="tiny"):
        await make_api().service.completions({"prompt": "a", "model": "../../etc/passwd"})


async def test_an_echo_begins_with_the_prompt(make_api, tokenizer):
    body = {"prompt": ["hello", "world"], "echo": True, "max_tokens": 2}
    assert [text[:5] for text in await texts(make_api(), body)] == ["hello", "world"]

    token_ids = tokenizer.encode("hello")
    streamed = await chunks_of(make_api(), {"prompt": token_ids, "echo": True, "max_tokens": 2})
    assert streamed[0]["choices"][0]["text"].startswith("hello")
    assert not streamed[1]["choices"][0]["text"].startswith("hello")


async def test_an_echo_with_logprobs_is_what_lm_eval_reads(make_api, tokenizer):
    prompt = tokenizer.encode("hello world", add_special_tokens=False)
    body = {"prompt": [prompt], "echo": True, "logprobs": 1, "max_tokens": 1, "temperature": 0, "seed": 1}
    choice = (await make_api("!").service.completions(body))["choices"][0]

    logprobs = choice["logprobs"]
    assert logprobs["token_logprobs"] == [None, *[-0.5] * len(prompt)]
    assert logprobs["top_logprobs"][0] is None
    assert "".join(logprobs["tokens"]) == choice["text"] == "hello world!"
    assert [choice["text"][offset:][:1] for offset in logprobs["text_offset"]] == [
        token[0] for token in logprobs["tokens"]
    ]
    for token, top in zip(logprobs["tokens"][1:], logprobs["top_logprobs"][1:], strict=True):
        assert top == {token: -0.5}


async def test_offsets_of_an_echo_count_special_tokens_where_they_are_shown(make_api, tokenizer):
    api = make_api("..")
    body = {"echo": True, "logprobs": 0, "max_tokens": 1}
    text = await api.service.completions({**body, "prompt": "a<|im_end|>b"})
    token_ids = tokenizer.encode("a<|im_end|>b")
    hidden = await api.service.completions({**body, "prompt": token_ids})
    shown = await api.service.completions({**body, "prompt": token_ids, "skip_special_tokens": False})

    # The first token is the <s> that the tokenizer puts in front, which the client did not write.
    assert text["choices"][0]["text"] == "a<|im_end|>b."
    assert text["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 11, 12]
    assert hidden["choices"][0]["text"] == "ab."
    assert hidden["choices"][0]["logprobs"]["text_offset"] == [0, 0, 1, 1, 2]
    assert shown["choices"][0]["text"] == "<s>a<|im_end|>b."
    assert shown["choices"][0]["logprobs"]["text_offset"] == [0, 3, 4, 14, 15]


async def test_an_echo_of_too_many_logprobs_is_refused_before_it_is_computed(make_api):
    api = make_api(max_model_len=4000)
    body = {"prompt": [[1] * 3000] * 40, "echo": True, "logprobs": 20, "max_tokens": 1}
    with pytest.raises(InvalidRequestError, match=r"2520000 log-probabilities, and at most 2000000"):
        await api.service.completions(body)
    assert not api.engine.asked


async def test_a_text_that_cannot_fit_is_refused_without_tokenising_it(make_api, tokenizer, monkeypatch):
    api = make_api()
    monkeypatch.setattr(tokenizer, "encode", lambda *_, **__: pytest.fail("it was tokenised"))
    with pytest.raises(ContextLengthError, match="maximum context length is 64 tokens"):
        await api.service.completions({"prompt": "x" * 1_000_000})


async def test_an_echo_alone_needs_no_token(make_api):
    answer = await make_api().service.completions({"prompt": "hello", "echo": True, "max_tokens": 0, "logprobs": 0})

    assert answer["choices"][0]["text"] == "hello"
    assert answer["usage"]["completion_tokens"] == 0


async def test_part_of_a_character_is_written_as_bytes(make_api):
    answer = await make_api("\U0001f600").service.completions({"prompt": "a", "max_tokens": 4, "logprobs": 1})

    assert answer["choices"][0]["logprobs"]["tokens"][0] == "bytes:\\xf0"


async def test_logprobs_of_tokens_behind_a_stop_string_are_dropped(make_api):
    for tokens_per_output in (1, 100):
        api = make_api("a.b.c", tokens_per_output=tokens_per_output)
        choice = (await api.service.completions({"prompt": "x", "stop": ".", "logprobs": 0}))["choices"][0]

        assert (choice["text"], choice["logprobs"]["tokens"]) == ("a", ["a"])


async def test_streamed_logprobs_are_those_of_the_whole_answer(make_api):
    body = {"prompt": "x", "logprobs": 2, "max_tokens": 12, "stop": "three!"}
    whole = (await make_api().service.completions(body))["choices"][0]["logprobs"]
    streamed = [chunk["choices"][0]["logprobs"] for chunk in await chunks_of(make_api(), body)]

    assert {key: [item for part in streamed for item in part[key]] for key in whole} == whole


async def test_usage_comes_last_or_with_every_chunk(make_api):
    body = {"prompt": "x", "max_tokens": 3}
    plain = await chunks_of(make_api(), body)
    assert all("usage" not in chunk for chunk in plain)

    last = await chunks_of(make_api(), {**body, "stream_options": {"include_usage": True}})
    assert [chunk["usage"] is None for chunk in last] == [True, True, True, False]
    assert last[-1]["choices"] == []

    always = await chunks_of(
        make_api(), {**body, "stream_options": {"include_usage": True, "continuous_usage_stats": True}}
    )
    assert [chunk["usage"]["completion_tokens"] for chunk in always] == [1, 2, 3, 3]


async def test_the_first_token_is_told_at_once_even_if_it_is_not_yet_a_character(make_api):
    streamed = await chunks_of(make_api("\U0001f600"), {"prompt": "x", "max_tokens": 4})

    assert [chunk["choices"][0]["text"] for chunk in streamed] == ["", "\U0001f600"]


async def test_a_failure_of_one_choice_ends_all(make_api):
    api = make_api(fails_after=2)
    with pytest.raises(EngineFailureError):
        await api.service.completions({"prompt": ["a", "b"], "n": 2})

    assert api.engine.num_open == 0


async def test_capacity_is_asked_for_all_choices_before_anything_is_tokenised(make_api):
    api = make_api()
    with pytest.raises(InvalidRequestError, match="surrogate"):
        await api.service.completions({"prompt": ["\ud800", "b"], "n": 3})

    assert api.engine.capacity_asked == [6]
