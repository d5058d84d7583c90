"""Which pipeline a request goes to."""

import itertools
from array import array
from collections.abc import Mapping
from dataclasses import replace

from rayserve_sarathi.kv.prefix_marks import PrefixMarks, marks_of_prompt
from rayserve_sarathi.routing import Call, PipelineChooser, PipelineReport, Prompt, group_by_prefix

BLOCK_SIZE = 4


class Clock:
    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


def prompt(first_token: int, num_tokens: int = 400) -> Prompt:
    """Make a prompt that shares its beginning with others of the same first token alone."""
    token_ids = array("i", [first_token] * num_tokens)
    return Prompt(num_tokens=num_tokens, prefix=marks_of_prompt(token_ids, block_size=BLOCK_SIZE, cache_salt=""))


def having(*prompts: Prompt, backlog: int = 0, num_open: int = 0, is_ready: bool = True) -> PipelineReport:
    """Make the report of a pipeline that has the prompts in its cache."""
    marks = b"".join(mark for cached in prompts for mark in cached.prefix.marks)
    return PipelineReport(is_ready=is_ready, prefill_backlog_tokens=backlog, num_open_requests=num_open, marks=marks)


class Ingress:
    """Sends calls, hears of pipelines."""

    def __init__(self, clock: Clock | None = None) -> None:
        self.chooser = PipelineChooser(clock=clock or Clock())
        self.calls: list[Call] = []
        self.known: dict[str, int] = {}
        """By pipeline, the last call that its last report knows of."""

    def choose(self, names: str, prompts: list[Prompt]) -> str:
        self.calls.append(Call("ingress", len(self.calls) + 1, num_waiting=len(prompts), num_open=len(prompts)))
        return self.chooser.choose(names, prompts, call=self.calls[-1])

    def hear(self, reports: Mapping[str, PipelineReport], *, knowing: str) -> None:
        """Hear from pipelines; the reports of those in `knowing` are new, and know of all that was sent."""
        self.known.update(dict.fromkeys(knowing, len(self.calls)))
        last_calls = {name: {"ingress": self.known.get(name, 0), "another": 10_000} for name in reports}
        self.chooser.update({name: replace(report, last_calls=last_calls[name]) for name, report in reports.items()})

    def hear_answers(self) -> None:
        """Get all that is open answered to the end."""
        for call in self.calls:
            call.num_waiting = call.num_open = 0


def chooser_of(clock: Clock | None = None, **reports: PipelineReport) -> Ingress:
    ingress = Ingress(clock)
    ingress.hear(reports, knowing="")
    return ingress


def test_a_request_goes_where_its_prefix_is_cached():
    chooser = chooser_of(a=having(prompt(1)), b=having(prompt(2)))

    assert chooser.choose("ab", [prompt(2)]) == "b"
    assert chooser.choose("ab", [prompt(1)]) == "a"


def test_the_longest_prefix_wins():
    chooser = chooser_of(a=having(prompt(1, 100)), b=having(prompt(1, 300)))

    assert chooser.choose("ab", [prompt(1, 400)]) == "b"


def test_a_backlog_longer_than_twice_the_saved_tokens_is_avoided():
    def choose(backlog: int) -> str:
        return chooser_of(a=having(prompt(1), backlog=backlog), b=having()).choose("ab", [prompt(1)])

    assert prompt(1).prefix.num_known_tokens(prompt(1).prefix.marks) == 384
    assert choose(2 * 384) == "a"
    assert choose(2 * 384 + 1) == "b"


def test_an_unknown_prompt_goes_to_the_least_backlog():
    assert chooser_of(a=having(backlog=50), b=having(backlog=40)).choose("ab", [prompt(1)]) == "b"
    assert chooser_of(a=having(num_open=3), b=having(num_open=2)).choose("ab", [prompt(1)]) == "b"


def test_a_short_prefix_that_all_share_does_not_gather_all_requests():
    chooser = chooser_of(a=having(prompt(1, 17), num_open=20), b=having())

    assert chooser.choose("ab", [prompt(1, 17)]) == "b"


def test_requests_with_one_prefix_meet_before_any_report():
    chooser = chooser_of(a=having(), b=having(), c=having())
    first = chooser.choose("abc", [prompt(1)])

    assert [chooser.choose("abc", [prompt(1)]) for _ in range(5)] == [first] * 5


def test_a_burst_of_different_prompts_spreads_before_any_report():
    chooser = chooser_of(a=having(), b=having(), c=having())

    assert sorted(chooser.choose("abc", [prompt(index)]) for index in range(9)) == list("aaabbbccc")


def test_different_prompts_one_after_another_use_all_pipelines():
    chooser = chooser_of(a=having(), b=having())
    chosen = []
    for index in range(4):
        chosen.append(chooser.choose("ab", [prompt(index)]))
        chooser.hear({"a": having(), "b": having()}, knowing="ab")  # it has been computed

    assert sorted(chosen) == list("aabb")


def test_requests_one_after_another_follow_their_prefix_whenever_pipelines_report():
    """Four prefixes, five requests each, each of them answered before the next; each pipeline reports once."""
    for moments in itertools.product(range(20), repeat=2):
        chooser = chooser_of(a=having(), b=having())
        heard = {"a": having(), "b": having()}
        chosen: list[str] = []
        for index in range(20):
            chosen.append(chooser.choose("ab", [prompt(index // 5, 168)]))
            for name, moment in zip("ab", moments, strict=True):
                if index == moment:  # while the newest request is computed
                    backlog = 0 if index % 5 else 168
                    heard[name] = having(backlog=backlog, num_open=1) if chosen[-1] == name else having()
                    chooser.hear(heard, knowing=name)
            chooser.hear_answers()

        assert all(len(set(chosen[first : first + 5])) == 1 for first in range(0, 20, 5)), moments
        assert set(chosen) == set("ab"), moments


def test_what_is_answered_counts_as_open_until_it_ends():
    chooser = chooser_of(a=having(), b=having(num_open=3))
    assert chooser.choose("ab", [prompt(1), prompt(1)]) == "a"
    [call] = chooser.calls
    call.num_waiting = 0
    assert chooser.choose("ab", [prompt(2)]) == "a"
    assert chooser.choose("ab", [prompt(3)]) == "b"
    chooser.hear_answers()

    assert chooser.choose("ab", [prompt(4)]) == "a"


def test_what_was_sent_counts_until_a_report_knows_of_it_or_it_is_lost():
    def next_of(*, after_s: float, last_calls: dict[str, int]) -> str:
        clock = Clock()
        chooser = PipelineChooser(clock=clock)
        chooser.update({"a": having(), "b": having(num_open=2)})
        assert chooser.choose("ab", [prompt(1)], call=Call("ingress", 7, num_waiting=1, num_open=1)) == "a"
        clock.now_s = after_s
        chooser.update({"a": replace(having(), last_calls=last_calls), "b": having(num_open=2)})
        return chooser.choose("ab", [prompt(2)], call=Call("ingress", 8, num_waiting=1, num_open=1))

    assert next_of(after_s=9, last_calls={}) == "b"
    assert next_of(after_s=9, last_calls={"ingress": 6, "another": 7}) == "b"
    assert next_of(after_s=9, last_calls={"ingress": 7}) == "a"
    assert next_of(after_s=11, last_calls={}) == "a"


def test_a_question_counts_for_nothing():
    chooser = PipelineChooser(clock=Clock())
    chooser.update({"a": having(), "b": having(num_open=2)})

    assert [chooser.choose("ab", [], call=None) for _ in range(20)] == ["a"] * 20


def test_what_was_sent_long_ago_is_believed_only_if_it_is_reported():
    clock = Clock()
    chooser = chooser_of(clock, a=having(), b=having())
    assert chooser.choose("ab", [prompt(1)]) == "a"
    clock.now_s = 60

    assert chooser.choose("ab", [prompt(1)]) == "b"


def test_a_pipeline_that_is_rebuilt_gets_nothing_while_another_computes():
    chooser = chooser_of(a=having(prompt(1), is_ready=False), b=having(backlog=10_000))

    assert chooser.choose("ab", [prompt(1)]) == "b"
    assert chooser.choose("a", [prompt(1)]) == "a"


def test_a_pipeline_that_has_not_reported_takes_requests():
    assert chooser_of().choose("a", [prompt(1)]) == "a"


def test_a_pipeline_that_is_gone_and_back_is_a_new_one():
    chooser = chooser_of(a=having(), b=having())
    assert chooser.choose("ab", [prompt(1)]) == "a"
    chooser.hear({"b": having()}, knowing="b")
    chooser.hear({"a": having(), "b": having()}, knowing="ab")

    assert chooser.choose("ba", [prompt(1)]) == "b"


def test_requests_with_the_same_beginning_travel_together_and_few_in_a_call():
    prompts = [prompt(index % 2) for index in range(18)] + [Prompt(num_tokens=3, prefix=PrefixMarks())]

    groups = group_by_prefix(prompts, lambda item: item.prefix)

    assert [len(group) for group in groups] == [8, 1, 8, 1, 1]
    assert all(len({item.prefix.marks[:1] for item in group}) == 1 for group in groups)
