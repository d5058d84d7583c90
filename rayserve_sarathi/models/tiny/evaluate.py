"""Count what the tiny model gets right: ``python -m rayserve_sarathi.models.tiny.evaluate``.

The questions are those of the corpus, asked one at a time and answered
greedily, so the counts say how firmly the model holds what it was taught.
"""

import argparse
import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from rayserve_sarathi.models.tiny.corpus import (
    ANIMALS,
    CAPITALS,
    ENGINE,
    LARGEST_TERM,
    OPPOSITES,
    READERS,
    THINGS,
    article,
)

LONGEST_ANSWER = 220
BATCH = 64

Message = dict[str, str]
PAIRS = tuple((animal, thing) for animal in ANIMALS for thing in THINGS)


def user(content: str) -> Message:
    """Return what a reader writes."""
    return {"role": "user", "content": content}


def greedy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, conversations: list[list[Message]]) -> list[str]:
    """Return the model's likeliest answer to each conversation."""
    model.train(False)
    answers: list[str] = []
    for start in range(0, len(conversations), BATCH):
        prompts = [
            str(tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False))
            for messages in conversations[start : start + BATCH]
        ]
        inputs = tokenizer(prompts, padding=True, return_tensors="pt")
        with torch.inference_mode():
            output = model.generate(  # type: ignore[operator]  # the stubs take it for a tensor
                **inputs, do_sample=False, max_new_tokens=LONGEST_ANSWER
            )
        answers += tokenizer.batch_decode(output[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    return answers


def stories_kept(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, pairs: tuple[tuple[str, str], ...]) -> int:
    """Return how many stories are about the animal and the thing asked for, and come to an end.

    The animal has to be the one of the first sentence, and no other thing may
    turn up. Whether names and animals stay the same to the end is not looked at.
    """
    asked = [[user(f"Tell me a story about {article(animal)} and {article(thing)}.")] for animal, thing in pairs]
    kept = 0
    for (animal, thing), story in zip(pairs, greedy(model, tokenizer, asked), strict=True):
        is_hero = f" {animal} named" in story.partition(".")[0]
        others = any(f" {other}" in story for other in THINGS if other != thing)
        kept += is_hero and story.count(f" {thing}") > 1 and not others and story.endswith("The end.")
    return kept


def score(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> dict[str, tuple[int, int]]:
    """Return, for each subject, how many answers are right and how many were asked for."""
    terms = range(LARGEST_TERM + 1)
    asked: dict[str, list[tuple[list[Message], str]]] = {
        "sums": [([user(f"What is {a} + {b}?")], f"{a} + {b} = {a + b}.") for a in terms for b in terms],
        "capitals": [([user(f"What is the capital of {land}?")], f" is {city}.") for land, city in CAPITALS.items()],
        "opposites": [
            ([user(f"What is the opposite of {word}?")], f" is {opposite}.")
            for pair in OPPOSITES
            for word, opposite in (pair, pair[::-1])
        ],
        "engine questions": [
            ([user(change(question))], answers[0])
            for questions, answers in ENGINE
            for question in questions
            for change in (str, str.lower, str.upper, lambda text: text.rstrip(".?"))
        ],
        "names": [
            (
                [
                    user(f"My name is {name}."),
                    {"role": "assistant", "content": f"Hello, {name}! How can I help you?"},
                    user("What is my name?"),
                ],
                f"Your name is {name}.",
            )
            for name in READERS
        ],
    }
    result = {"stories": (stories_kept(model, tokenizer, PAIRS), len(PAIRS))}
    for subject, cases in asked.items():
        answers = greedy(model, tokenizer, [messages for messages, _ in cases])
        right = sum(answer.endswith(expected) for answer, (_, expected) in zip(answers, cases, strict=True))
        result[subject] = (right, len(cases))
    return result


def main() -> None:
    """Score the model in a folder."""
    parser = argparse.ArgumentParser(description="Count what the tiny model gets right.")
    parser.add_argument("--model", type=Path, default=Path(__file__).parent, help="folder of the model")
    folder = parser.parse_args().model
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    for subject, (right, total) in score(model, tokenizer).items():
        sys.stdout.write(f"{subject}: {right} of {total}\n")


if __name__ == "__main__":
    main()
