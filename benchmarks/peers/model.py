"""A checkpoint that all engines serve, prompts for it, and what transformers says after them."""

import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from checkpoint import SIZES, make_checkpoint
from engines import MODELS
from transformers import AutoModelForCausalLM, AutoTokenizer

NUM_COMPARED = 32
COMPARED_PROMPTS = (1, 7, 32, 130, 300)
"""Their lengths, in tokens."""


class Model:
    """A checkpoint, and prompts for it: words that are a token each, so that text and token ids are the same.

    Args:
        name: A size.
    """

    def __init__(self, name: str) -> None:
        self.name = name
        self.folder = MODELS / name
        make_checkpoint(name, self.folder)
        self._tokenizer = AutoTokenizer.from_pretrained(self.folder)
        texts = {token_id: self._tokenizer.decode([token_id]) for token_id in range(len(self._tokenizer))}
        self._words = [
            token_id
            for token_id, text in texts.items()
            if text.startswith(" ") and text[1:].isalpha() and text.isascii()
            and self._tokenizer.encode(text, add_special_tokens=False) == [token_id]
        ]  # fmt: skip
        self._rng = np.random.default_rng(time.time_ns())

    def prompt(self, num_tokens: int) -> list[int]:
        """Return a new prompt."""
        return [int(token_id) for token_id in self._rng.choice(self._words, num_tokens)]

    def text(self, token_ids: Sequence[int]) -> str:
        """Return the text of tokens."""
        return str(self._tokenizer.decode(token_ids))

    def compare(self, answer: Callable[[list[int]], str]) -> str:
        """Return how many of some prompts get the text that transformers' greedy tokens have, all tokens of each."""
        judge = AutoModelForCausalLM.from_pretrained(self.folder)
        num_equal = 0
        for num_tokens in COMPARED_PROMPTS:
            prompt = self.prompt(num_tokens)
            out = judge.generate(torch.tensor([prompt]), max_new_tokens=NUM_COMPARED, do_sample=False)
            expected = self.text([int(token_id) for token_id in out[0, len(prompt) :]])
            num_equal += answer(prompt).strip() == expected.strip()
        return f"{num_equal} of {len(COMPARED_PROMPTS)}"

    def num_parameters(self) -> int:
        """Return the weights that a token is multiplied with: all but the embedding."""
        size = SIZES[self.name]
        head_size = size["hidden_size"] // size["num_attention_heads"]
        kv_size = 2 * size["num_key_value_heads"] * head_size
        attention = size["hidden_size"] * (2 * size["hidden_size"] + kv_size)
        mlp = 3 * size["hidden_size"] * size["intermediate_size"]
        return size["num_hidden_layers"] * (attention + mlp) + size["vocab_size"] * size["hidden_size"]
