import random
from collections.abc import Sequence

import pytest

from rayserve_sarathi.text.detokenizer import WindowDetokenizer
from rayserve_sarathi.text.tokenizer import Tokenizer

TEXTS = [
    "The quick brown fox, or two!",
    "\U0001f468\u200d\U0001f469\u200d\U0001f467 family and \U0001f1e9\U0001f1ea flag",
    "\u4f60\u597d\uff0c\u4e16\u754c",
    "e\u0301 a\u0308 combining",
    "  two spaces  and a\ttab\n",
    "",
]


def stream(tokenizer: Tokenizer, token_ids: list[int], **options: bool) -> list[str]:
    detokenizer = tokenizer.detokenizer(**options)
    return [*(detokenizer.push(token_id) for token_id in token_ids), detokenizer.flush()]


@pytest.mark.parametrize("text", TEXTS)
def test_deltas_add_up_to_the_text_of_all_tokens(any_tokenizer: Tokenizer, text: str):
    token_ids = any_tokenizer.encode(text)

    assert "".join(stream(any_tokenizer, token_ids)) == any_tokenizer.decode(token_ids)


def test_deltas_of_any_tokens_add_up_even_if_they_are_no_utf8(tokenizer: Tokenizer):
    rng = random.Random(0)
    for _ in range(500):
        token_ids = rng.choices(range(tokenizer.vocab_size), k=rng.randrange(1, 40))

        assert "".join(stream(tokenizer, token_ids)) == tokenizer.decode(token_ids)
        shown = "".join(stream(tokenizer, token_ids, skip_special_tokens=False))
        assert shown == tokenizer.decode(token_ids, skip_special_tokens=False)


def test_a_character_split_over_tokens_comes_whole(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("\U0001f600", add_special_tokens=False)
    assert len(token_ids) == 4

    assert stream(tokenizer, token_ids) == ["", "", "", "\U0001f600", ""]


def test_an_incomplete_character_is_replaced_only_at_the_end(byte_tokenizer: Tokenizer):
    token_ids = byte_tokenizer.encode("so \u4f60")

    *deltas, tail = stream(byte_tokenizer, token_ids[:-1])

    assert "".join(deltas) == "so "
    assert tail == "\ufffd"


def test_a_broken_byte_does_not_take_its_neighbours_along(byte_tokenizer: Tokenizer):
    token_ids = byte_tokenizer.encode("\u4f60\u597d")

    assert "".join(stream(byte_tokenizer, token_ids[:-1])) == "\u4f60\ufffd"


def test_special_tokens_have_no_text_unless_asked_for(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("<s>a</s>", add_special_tokens=False)

    assert "".join(stream(tokenizer, token_ids)) == "a"
    assert "".join(stream(tokenizer, token_ids, skip_special_tokens=False)) == "<s>a</s>"


def test_a_token_beyond_the_vocabulary_has_no_text(tokenizer: Tokenizer):
    assert tokenizer.detokenizer().push(tokenizer.vocab_size + 100) == ""
    assert tokenizer.token_bytes(tokenizer.vocab_size + 100) == b""


def test_decoding_a_window_takes_as_long_at_the_end_as_at_the_start():
    num_decoded: list[int] = []

    def decode(token_ids: Sequence[int]) -> str:
        num_decoded.append(len(token_ids))
        return "\ufffd" * len(token_ids)  # the worst: it may never become text

    detokenizer = WindowDetokenizer(decode, frozenset())
    shown = "".join(detokenizer.push(token_id) for token_id in range(1000)) + detokenizer.flush()

    assert len(shown) == 1000
    assert max(num_decoded) <= 16
