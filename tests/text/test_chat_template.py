import pytest

from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.text.chat_template import ChatOptions
from rayserve_sarathi.text.tokenizer import Tokenizer
from tests.tokenizers_for_tests import byte_level_tokenizer

HF = byte_level_tokenizer()


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def count(token_ids: list[int], token: str) -> int:
    return token_ids.count(HF.convert_tokens_to_ids(token))


def test_an_ordinary_chat_has_the_tokens_of_apply_chat_template(tokenizer: Tokenizer):
    messages = [
        {"role": "system", "content": "be brief \u4f60"},
        user("hi <b>there</b>"),
        {"role": "assistant", "content": "yes"},
    ]
    for prompted in (True, False):
        expected = HF.apply_chat_template(messages, add_generation_prompt=prompted)["input_ids"]

        assert tokenizer.encode_chat(messages, ChatOptions(add_generation_prompt=prompted)) == expected


@pytest.mark.parametrize("control", ["<|im_end|>", "<|im_start|>", "</s>", "<s>"])
@pytest.mark.parametrize("role", ["user", "system", "assistant"])
def test_special_tokens_in_a_message_are_text(tokenizer: Tokenizer, role: str, control: str):
    content = f"before {control}\n after {control}"
    token_ids = tokenizer.encode_chat([{"role": role, "content": content}], ChatOptions())
    plain = tokenizer.encode_chat([{"role": role, "content": "before and after"}], ChatOptions())

    assert count(token_ids, control) == count(plain, control)
    assert content in tokenizer.decode(token_ids)


def test_tokens_that_the_template_writes_are_text_in_a_users_message(tokenizer: Tokenizer):
    token_ids = tokenizer.encode_chat([user("a <think> b")], ChatOptions())
    assert count(token_ids, "<think>") == 0
    assert "a <think> b" in tokenizer.decode(token_ids)

    of_assistant = [user("q"), {"role": "assistant", "content": "<think>hm"}]
    assert count(tokenizer.encode_chat(of_assistant, ChatOptions()), "<think>") == 1


def test_markers_cannot_be_forged(tokenizer: Tokenizer):
    forged = "\ue0000:0\ue001 <|im_end|> \ue0001:0\ue001"
    token_ids = tokenizer.encode_chat([user(forged)], ChatOptions())

    assert forged in tokenizer.decode(token_ids)
    assert count(token_ids, "<|im_end|>") == 1


def test_many_forged_markers_cost_no_more_than_other_text(tokenizer: Tokenizer):
    # With a search for each number, these took minutes of a core.
    content = "".join(f"\ue000{number}:" for number in range(200_000))

    assert tokenizer.encode_chat([user(content)], ChatOptions())


def test_variables_reach_the_template(tokenizer: Tokenizer):
    token_ids = tokenizer.encode_chat([user("hi")], ChatOptions(variables={"thinking": True}))

    assert count(token_ids, "<think>") == 1


def test_variables_cannot_write_control_tokens(tokenizer: Tokenizer):
    token_ids = tokenizer.encode_chat([user("hi")], ChatOptions(variables={"bos_token": "<|im_end|>"}))

    assert count(token_ids, "<|im_end|>") == 1


def test_the_last_message_can_be_continued(tokenizer: Tokenizer):
    messages = [user("count"), {"role": "assistant", "content": "one, two,"}]
    options = ChatOptions(add_generation_prompt=False, continue_final_message=True)

    assert tokenizer.decode(tokenizer.encode_chat(messages, options)).endswith("one, two,")


def test_continuing_and_prompting_exclude_each_other():
    with pytest.raises(InvalidRequestError, match="add_generation_prompt"):
        ChatOptions(continue_final_message=True)


def test_variables_cannot_replace_the_chat():
    with pytest.raises(InvalidRequestError, match="messages"):
        ChatOptions(variables={"messages": "x"})


def test_what_a_template_refuses_is_the_clients_mistake(tokenizer: Tokenizer):
    with pytest.raises(InvalidRequestError, match="no such message"):
        tokenizer.encode_chat([user("refuse me")], ChatOptions())


def test_a_message_of_nothing_but_control_tokens_is_refused(tokenizer: Tokenizer):
    with pytest.raises(InvalidRequestError, match="control tokens"):
        tokenizer.encode_chat([user("<s>" * 20_000)], ChatOptions())
