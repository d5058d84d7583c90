"""Tokens to text, one token at a time: the deltas of a stream add up to the text of all its tokens.

An incomplete character is held back until the tokens that complete it arrive, and becomes U+FFFD only at the end.
"""

import codecs
from collections.abc import Callable, Sequence
from typing import Protocol

from rayserve_sarathi.text.token_bytes import TokenBytes

_REPLACEMENT = "\ufffd"
_MAX_HELD_TOKENS = 8
"""A UTF-8 character has at most 4 bytes; more tokens than this without a whole character are not text."""


class Detokenizer(Protocol):
    """The text of one growing output."""

    def push(self, token_id: int) -> str:
        """Return the text that a further token completes; empty while a character is incomplete."""

    def flush(self) -> str:
        """Return what was held back; nothing may be pushed afterwards."""


class ByteDetokenizer:
    """Concatenates the bytes of tokens.

    It equals the tokenizer's own `decode`, but for malformed UTF-8 from SentencePiece's byte tokens: there `decode`
    also drops the well-formed characters beside a broken one, which a stream has shown already.

    Args:
        token_bytes: The vocabulary.
        hidden_token_ids: Tokens without a text, such as special ones.
    """

    def __init__(self, token_bytes: TokenBytes, hidden_token_ids: frozenset[int]) -> None:
        self._table = token_bytes.table
        self._hidden = hidden_token_ids
        self._strips_space = token_bytes.strips_first_space
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        # A model's vocabulary may be padded beyond the tokenizer's.
        if token_id in self._hidden or token_id >= len(self._table):
            return ""
        piece = self._table[token_id]
        if self._strips_space and piece:
            self._strips_space = False
            piece = piece.removeprefix(b" ")
        return self._decoder.decode(piece)

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._decoder.decode(b"", final=True)


class WindowDetokenizer:
    """Decodes the last few tokens again with each new one, for a tokenizer whose decoder is not a concatenation.

    Args:
        decode: The tokenizer's own decoding of a list of tokens.
        hidden_token_ids: Tokens without a text, such as special ones.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str], hidden_token_ids: frozenset[int]) -> None:
        self._decode = decode
        self._hidden = hidden_token_ids
        self._context: list[int] = []  # tokens already shown, which the next ones' text may depend on (a space, say)
        self._context_text = ""
        self._pending: list[int] = []

    def push(self, token_id: int) -> str:
        """See `Detokenizer`."""
        if token_id in self._hidden:
            return ""
        self._pending.append(token_id)
        text = self._decode(self._context + self._pending)
        if text.endswith(_REPLACEMENT) and len(self._pending) < _MAX_HELD_TOKENS:
            return ""
        return self._show(text)

    def flush(self) -> str:
        """See `Detokenizer`."""
        return self._show(self._decode(self._context + self._pending))

    def _show(self, text: str) -> str:
        delta = text[len(self._context_text) :]
        if self._pending:
            self._context, self._pending = self._pending, []
            self._context_text = self._decode(self._context)
        return delta
