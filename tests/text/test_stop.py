import itertools

import pytest

from rayserve_sarathi.text.stop import StopChecker, StopStrings


def cut(
    text: str, stops: list[str], *, is_included: bool = False, sizes: tuple[int, ...] = (1,)
) -> tuple[str, str | None]:
    """Push `text` in parts of these sizes, again and again; return what is shown, and the stop."""
    checker = StopChecker(StopStrings(stops, is_included=is_included))
    shown, position = "", 0
    for size in itertools.cycle(sizes):
        if position >= len(text) or checker.matched is not None:
            break
        shown += checker.push(text[position : position + size])
        position += size
    return (shown if checker.matched is not None else shown + checker.flush()), checker.matched


def test_text_that_may_begin_a_stop_string_is_held_back():
    checker = StopChecker(StopStrings(["END"]))

    assert [checker.push(part) for part in ["say ", "E", "N", "d", "E", "ND"]] == ["say ", "", "", "ENd", "", ""]
    assert checker.matched == "END"


def test_only_the_longest_possible_beginning_is_held_back():
    checker = StopChecker(StopStrings(["aab"]))

    assert [checker.push(part) for part in ["aaaa", "c"]] == ["aa", "aac"]


def test_text_held_back_is_shown_at_the_end():
    checker = StopChecker(StopStrings(["\n\n"]))

    assert checker.push("done\n") == "done"
    assert checker.flush() == "\n"


@pytest.mark.parametrize(
    ("stops", "shown", "matched"),
    [
        (["bc", "abcd"], "xa", "bc"),  # the one that is complete first
        (["bcd", "abcd"], "x", "abcd"),  # the longer of two that end together
        (["abx", "bcy"], "xabcde", None),
        (["e"], "xabcd", "e"),
        (["xabcde"], "", "xabcde"),  # the whole output
    ],
)
@pytest.mark.parametrize("sizes", [(1,), (2,), (1, 3), (6,)])
def test_the_cut_does_not_depend_on_the_tokens(stops, shown, matched, sizes):
    assert cut("xabcde", stops, sizes=sizes) == (shown, matched)


def test_random_texts_are_cut_where_a_plain_search_cuts_them():
    alphabet = "ab"
    stops = ["aba", "bb", "aabb"]
    for letters in itertools.product(alphabet, repeat=9):
        text = "".join(letters)
        ends = [(text.find(stop) + len(stop), text.find(stop)) for stop in stops if stop in text]
        expected = text[: min(ends)[1]] if ends else text

        assert cut(text, stops)[0] == cut(text, stops, sizes=(3, 2))[0] == expected


def test_a_stop_string_may_stay_in_the_text():
    assert cut("one. two", ["."], is_included=True, sizes=(3,)) == ("one.", ".")


def test_a_stop_string_may_hold_any_character():
    assert cut("ab \U0001f600 cd", ["\U0001f600"]) == ("ab ", "\U0001f600")
