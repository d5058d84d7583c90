from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayserve_sarathi.errors import ConfigError, InvalidRequestError
from rayserve_sarathi.text.chat_template import ChatOptions
from rayserve_sarathi.text.tokenizer import Tokenizer, load_tokenizer
from tests.tokenizers_for_tests import byte_level_tokenizer, python_tokenizer, save


def test_tokens_are_those_of_the_checkpoint(tmp_path: Path):
    hf = byte_level_tokenizer()
    tokenizer = load_tokenizer(save(hf, tmp_path))

    text = "hello <|im_end|> world \U0001f600"
    assert tokenizer.encode(text) == hf(text)["input_ids"]
    assert tokenizer.encode(text, add_special_tokens=False) == hf(text, add_special_tokens=False)["input_ids"]
    assert tokenizer.vocab_size == len(hf)
    assert tokenizer.eos_token_id == hf.eos_token_id


def test_a_missing_tokenizer_names_its_folder(tmp_path: Path):
    with pytest.raises(ConfigError, match="nothing-here"):
        load_tokenizer(str(tmp_path / "nothing-here"))


def test_a_chat_template_file_replaces_the_checkpoints_own(tmp_path: Path):
    folder = save(byte_level_tokenizer(), tmp_path / "model")
    template = tmp_path / "template.jinja"
    template.write_text("{{ messages[0]['content'] }}!", encoding="utf-8")
    tokenizer = load_tokenizer(folder, chat_template=str(template))

    token_ids = tokenizer.encode_chat([{"role": "user", "content": "hi"}], ChatOptions())

    assert tokenizer.decode(token_ids) == "hi!"


def test_an_unreadable_chat_template_names_its_file(tmp_path: Path):
    folder = save(byte_level_tokenizer(), tmp_path / "model")

    with pytest.raises(ConfigError, match=r"missing\.jinja"):
        load_tokenizer(folder, chat_template=str(tmp_path / "missing.jinja"))


def test_half_a_surrogate_pair_is_the_clients_mistake(any_tokenizer: Tokenizer):
    with pytest.raises(InvalidRequestError, match="surrogate"):
        any_tokenizer.encode("a\ud800b")


def test_a_tokenizer_without_a_template_refuses_chats():
    tokenizer = Tokenizer(byte_level_tokenizer(template=None))

    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="/v1/completions"):
        tokenizer.encode_chat([{"role": "user", "content": "hi"}], ChatOptions())


def test_many_threads_may_encode_at_once(tokenizer: Tokenizer):
    texts = [f"the model and <|im_end|> {number}" * 50 for number in range(40)]
    expected = [tokenizer.encode(text) for text in texts]

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(tokenizer.encode, texts)) == expected


def test_token_bytes_add_up_to_the_text(any_tokenizer: Tokenizer):
    token_ids = any_tokenizer.encode("the quick model", add_special_tokens=False)
    text = b"".join(any_tokenizer.token_bytes(token_id) for token_id in token_ids).decode()

    # SentencePiece puts a space before the first word; a decoder of unknown kind drops them from single tokens.
    assert text.strip().replace(" ", "") == "thequickmodel"


def test_info_holds_what_a_remote_client_needs(tokenizer: Tokenizer):
    info = tokenizer.info()

    assert info["eos_token"] == "</s>"
    assert "<|im_start|>" in str(info["chat_template"])


def test_a_tokenizer_in_python_works_as_the_others_do():
    hf = python_tokenizer()
    tokenizer = Tokenizer(hf)

    assert tokenizer.encode("ab</s>") == [97, 98, hf.eos_token_id]
    token_ids = tokenizer.encode_chat([{"role": "user", "content": "a</s>"}], ChatOptions())
    assert token_ids.count(hf.eos_token_id) == 0
    detokenizer = tokenizer.detokenizer()
    shown = "".join(detokenizer.push(token_id) for token_id in token_ids) + detokenizer.flush()
    assert shown == tokenizer.decode(token_ids)
    assert "a</s>" in shown
    assert tokenizer.token_bytes(97) == b"a"
