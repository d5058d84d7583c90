from rayserve_sarathi.text.output_text import OutputText
from rayserve_sarathi.text.stop import StopStrings
from rayserve_sarathi.text.tokenizer import Tokenizer


def test_a_stop_string_inside_a_split_character_and_over_tokens_cuts_there(tokenizer: Tokenizer):
    text = OutputText(tokenizer.detokenizer(), StopStrings(["\u597d!"]))

    shown = ""
    for token_id in tokenizer.encode("hello \u4f60\u597d! more", add_special_tokens=False):
        shown += text.push(token_id)
        if text.matched_stop is not None:
            break

    assert (shown, text.matched_stop) == ("hello \u4f60", "\u597d!")


def test_stop_strings_before_min_tokens_do_not_count(tokenizer: Tokenizer):
    token_ids = tokenizer.encode("a.b.c", add_special_tokens=False)
    assert len(token_ids) == 5
    text = OutputText(tokenizer.detokenizer(), StopStrings(["."]), min_tokens=2)

    assert [text.push(token_id) for token_id in token_ids[:4]] == ["a", ".", "b", ""]
    assert text.matched_stop == "."


def test_a_stop_string_in_the_tail_still_counts(tokenizer: Tokenizer):
    text = OutputText(tokenizer.detokenizer(), StopStrings(["\ufffd"]))

    assert text.push(tokenizer.encode("\u4f60", add_special_tokens=False)[0]) == ""
    assert text.flush() == ""
    assert text.matched_stop == "\ufffd"


def test_shown_characters_lag_behind_those_known(tokenizer: Tokenizer):
    text = OutputText(tokenizer.detokenizer(), StopStrings(["!!"]))
    text.push(tokenizer.encode("!", add_special_tokens=False)[0])

    assert (text.num_chars, text.num_shown_chars) == (1, 0)
