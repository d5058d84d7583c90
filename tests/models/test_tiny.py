"""The model that comes with the package: complete, small, and of some sense."""

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from rayserve_sarathi import LLM, SamplingParams
from rayserve_sarathi.models.resolve import resolve_folder
from rayserve_sarathi.request import FinishReason
from tests.servable import Reference

GREEDY = SamplingParams(max_tokens=200, temperature=0)


@pytest.fixture(scope="module")
def folder() -> Path:
    return resolve_folder("sarathi-tiny", None)


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM("sarathi-tiny", pipeline_parallel_size=2, max_model_len=1024)


def test_it_takes_less_than_8_megabytes(folder: Path):
    assert sum(file.stat().st_size for file in folder.iterdir() if file.is_file()) < 8_000_000


def test_it_tells_the_story_that_was_asked_for_and_ends_it(llm: LLM):
    answer = llm.chat([{"role": "user", "content": "Tell me a story about a fox and a lantern."}], GREEDY)

    assert answer.finish_reason is FinishReason.STOP
    assert answer.text.count("fox") >= 2
    assert answer.text.count("lantern") >= 2
    assert answer.text.endswith("The end.")


@pytest.mark.parametrize(
    ("question", "part"),
    [
        ("Who are you?", "rayserve_sarathi"),
        ("What is 3 + 4?", "7"),
        ("What is a token budget?", "tokens"),
        ("What is the capital of France?", "Paris"),
    ],
)
def test_it_answers_what_its_card_promises(llm: LLM, question: str, part: str):
    assert part in llm.chat([{"role": "user", "content": question}], GREEDY).text


def test_its_greedy_tokens_are_those_of_transformers(llm: LLM, folder: Path):
    prompt = AutoTokenizer.from_pretrained(folder).encode("Once upon a time")
    tokens = llm.generate(prompt, SamplingParams(max_tokens=100, temperature=0), has_progress_bar=False)[0].token_ids

    assert list(tokens) == Reference(folder).generate(prompt, 100)
