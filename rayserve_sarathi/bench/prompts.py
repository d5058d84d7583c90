"""Prompts of given lengths, of tokens drawn at random."""

import secrets

import numpy as np

VOCAB_SIZE_EVERYWHERE = 1000
"""Every model has so many token ids."""


class Prompts:
    """Makes the prompt of each request; equal arguments make equal prompts.

    A seed that was used before makes prompts that the server may have in its prefix cache. So it is drawn anew where
    nobody gives one, apart from the seed of lengths and arrivals.

    Args:
        vocab_size: Token ids are less.
        seed: None draws one.
    """

    def __init__(self, *, vocab_size: int, seed: int | None = None) -> None:
        self.vocab_size = vocab_size
        self.seed = secrets.randbits(32) if seed is None else seed

    def make(self, index: int, num_tokens: int) -> list[int]:
        """Return the prompt of the request of an index."""
        rng = np.random.default_rng((self.seed, index))
        token_ids: list[int] = rng.integers(0, self.vocab_size, num_tokens).tolist()
        return token_ids
