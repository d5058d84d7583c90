"""The bytes that each token of a vocabulary stands for, where the tokenizer's decoder is a plain concatenation of them.

That holds for the two families in use: byte-level BPE (GPT-2, Llama 3, Qwen, Falcon) and SentencePiece with byte
fallback (Llama 2, Mistral, Yi). Which one it is, is read from the decoder's own description.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass

from tokenizers import Tokenizer as BackendTokenizer

_BYTE_TOKEN = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_WORD_START = "\u2581"
_REPLACE_WORD_START = {"type": "Replace", "pattern": {"String": _WORD_START}, "content": " "}
_STRIP_FIRST_SPACE = {"type": "Strip", "content": " ", "start": 1, "stop": 0}


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBytes:
    """Bytes of each token, by id."""

    table: tuple[bytes, ...]
    """An id that the vocabulary leaves out has no bytes."""
    strips_first_space: bool
    """Whether one space at the very start of a text is the tokenizer's and not the text's."""


def read_token_bytes(backend: BackendTokenizer) -> TokenBytes | None:
    """Return the bytes of each token, or None if this tokenizer's decoder does more than concatenate them."""
    steps = _decoder_steps(backend)
    if [step["type"] for step in steps] == ["ByteLevel"]:
        characters = _byte_level_characters()
        return _tabulate(backend, lambda token: _byte_level_bytes(token, characters), strips_first_space=False)
    required = [_REPLACE_WORD_START, {"type": "ByteFallback"}, {"type": "Fuse"}]
    if steps == required or steps == [*required, _STRIP_FIRST_SPACE]:
        return _tabulate(backend, _sentencepiece_bytes, strips_first_space=_STRIP_FIRST_SPACE in steps)
    return None


def _decoder_steps(backend: BackendTokenizer) -> list[dict[str, object]]:
    decoder = json.loads(backend.to_str())["decoder"]
    if decoder is None:
        return []
    steps: list[dict[str, object]] = decoder["decoders"] if decoder["type"] == "Sequence" else [decoder]
    return steps


def _tabulate(backend: BackendTokenizer, to_bytes: Callable[[str], bytes], *, strips_first_space: bool) -> TokenBytes:
    vocab = backend.get_vocab(with_added_tokens=True)
    table = [b""] * (max(vocab.values(), default=-1) + 1)
    for token, token_id in vocab.items():
        table[token_id] = to_bytes(token)
    return TokenBytes(table=tuple(table), strips_first_space=strips_first_space)


def _sentencepiece_bytes(token: str) -> bytes:
    if match := _BYTE_TOKEN.fullmatch(token):
        return bytes([int(match[1], 16)])
    return token.replace(_WORD_START, " ").encode()


def _byte_level_characters() -> dict[str, int]:
    # GPT-2's alphabet: a byte that is a visible Latin-1 character stands for itself, the others follow from U+0100 on.
    visible = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(0x100 + place): byte for place, byte in enumerate(hidden)}


def _byte_level_bytes(token: str, characters: dict[str, int]) -> bytes:
    try:
        return bytes([characters[character] for character in token])
    except KeyError:  # an added token is written as it reads, not in the byte alphabet
        return token.encode()
