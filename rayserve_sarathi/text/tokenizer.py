"""A Hugging Face tokenizer behind the few things that serving needs of it.

A fast tokenizer is called below transformers, whose wrapper changes its settings on each call and so must not be used
from two threads at once; `encode` and `encode_chat` may. Transformers is loaded with the first tokenizer, as it takes
seconds, and loads torch: whoever only names these classes need not wait for it.
"""

import json
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import tokenizers

from rayserve_sarathi.errors import ConfigError, InvalidRequestError
from rayserve_sarathi.registry import import_object
from rayserve_sarathi.text.chat_template import ChatOptions, ChatTemplate, Message
from rayserve_sarathi.text.detokenizer import ByteDetokenizer, Detokenizer, WindowDetokenizer
from rayserve_sarathi.text.token_bytes import read_token_bytes

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

_Encode = Callable[[str, bool], list[int]]


def load_tokenizer(
    model: str,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    chat_template: str | None = None,
) -> "Tokenizer":
    """Load the tokenizer of a checkpoint.

    Args:
        model: Local folder or hub id.
        revision: Branch, tag or commit on the hub.
        trust_remote_code: Whether to run tokenizer code from the checkpoint.
        chat_template: Path of a Jinja file that replaces the checkpoint's own template.

    Raises:
        ConfigError: There is no such tokenizer, or the template cannot be read.
    """
    try:
        hf = import_object("transformers:AutoTokenizer").from_pretrained(
            model, revision=revision, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, ImportError) as error:
        raise ConfigError(f"cannot load a tokenizer from {model!r}: {error}") from error
    if chat_template is not None:
        try:
            hf.chat_template = Path(chat_template).read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(f"cannot read the chat template {chat_template!r}: {error}") from error
    return Tokenizer(hf)


class Tokenizer:
    """Text to tokens and back.

    Args:
        hf: Owned by this object from now on.
    """

    def __init__(self, hf: "PreTrainedTokenizerBase") -> None:
        self._hf = hf
        # The text of a token must not depend on the tokens after it, so no tidying of spaces.
        hf.clean_up_tokenization_spaces = False
        self._special_ids = frozenset(hf.all_special_ids)
        self._token_bytes = None
        if hf.is_fast:
            self._encode, self._encode_literal = _fast_encoders(hf.backend_tokenizer)
            self._special_ids |= {i for i, token in hf.added_tokens_decoder.items() if token.special}
            self._token_bytes = read_token_bytes(hf.backend_tokenizer)
        else:
            self._encode, self._encode_literal = _slow_encoders(hf)
        self._chat_template = ChatTemplate(hf) if hf.chat_template else None

    @property
    def vocab_size(self) -> int:
        """One more than the largest token id."""
        return len(self._hf)

    @property
    def eos_token_id(self) -> int | None:
        """The tokenizer's own end of sequence; None if it has none."""
        eos_token_id: int | None = self._hf.eos_token_id
        return eos_token_id

    @property
    def has_chat_template(self) -> bool:
        """Whether `encode_chat` can be used."""
        return self._chat_template is not None

    @property
    def max_token_bytes(self) -> int | None:
        """Bytes of the longest token, where a text has as many bytes as its tokens; None if it may have others."""
        return None if self._token_bytes is None else max(map(len, self._token_bytes.table))

    def is_special(self, token_id: int) -> bool:
        """Whether a token stands for no text of its own."""
        return token_id in self._special_ids

    def encode(self, text: str, *, add_special_tokens: bool = True) -> list[int]:
        """Return the tokens of a text.

        Raises:
            InvalidRequestError: The text holds half of a surrogate pair, which is no character.
        """
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InvalidRequestError(
                f"the text holds half of a surrogate pair at character {error.start}; send whole characters"
            ) from None
        return self._encode(text, add_special_tokens)

    def encode_chat(self, messages: Sequence[Message], options: ChatOptions) -> list[int]:
        """Return the tokens of a chat; strings of control tokens inside messages are encoded as ordinary text.

        Raises:
            InvalidRequestError: The tokenizer has no chat template, or it refuses these messages.
        """
        if self._chat_template is None:
            raise InvalidRequestError("this model has no chat template; use /v1/completions", param="messages")
        token_ids: list[int] = []
        for piece in self._chat_template.render(messages, options):
            if piece.is_literal:
                token_ids += self._encode_as_text(piece.text)
            else:
                token_ids += self.encode(piece.text, add_special_tokens=False)
        return token_ids

    def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Return the text of tokens."""
        text = self._hf.decode(list(token_ids), skip_special_tokens=skip_special_tokens)
        assert isinstance(text, str), type(text)
        return text

    def detokenizer(self, *, skip_special_tokens: bool = True) -> Detokenizer:
        """Return a detokenizer for a new output."""
        hidden = self._special_ids if skip_special_tokens else frozenset()
        if self._token_bytes is not None:
            return ByteDetokenizer(self._token_bytes, hidden)
        return WindowDetokenizer(lambda ids: self.decode(ids, skip_special_tokens=False), hidden)

    def token_bytes(self, token_id: int) -> bytes:
        """Return the bytes that a token stands for, a special token's being its name."""
        if self._token_bytes is None:
            return self.decode([token_id], skip_special_tokens=False).encode()
        table = self._token_bytes.table
        return table[token_id] if token_id < len(table) else b""

    def info(self) -> dict[str, object]:
        """Return what a client needs to use the same tokenizer and template, as `/tokenizer_info` shows it."""
        return {
            "tokenizer_class": type(self._hf).__name__,
            "vocab_size": self.vocab_size,
            "bos_token": self._hf.bos_token,
            "eos_token": self._hf.eos_token,
            "pad_token": self._hf.pad_token,
            "unk_token": self._hf.unk_token,
            "chat_template": self._hf.chat_template,
        }

    def _encode_as_text(self, text: str) -> list[int]:
        token_ids = self._encode_literal(text)
        if self._special_ids.isdisjoint(token_ids):
            return token_ids
        # The model's own vocabulary holds the whole string as well; its characters apart cannot make the token.
        return [token_id for character in text for token_id in self._encode_literal(character)]


def _fast_encoders(backend: tokenizers.Tokenizer) -> tuple[_Encode, Callable[[str], list[int]]]:
    backend.no_truncation()
    backend.no_padding()
    without_added_tokens = _without_added_tokens(backend)

    # Batches of one: unlike `encode`, they let other threads run meanwhile, and `fast` leaves out the offsets.
    def encode(text: str, add_special_tokens: bool) -> list[int]:
        return backend.encode_batch_fast([text], add_special_tokens=add_special_tokens)[0].ids

    def encode_literal(text: str) -> list[int]:
        return without_added_tokens.encode_batch_fast([text], add_special_tokens=False)[0].ids

    return encode, encode_literal


def _without_added_tokens(backend: tokenizers.Tokenizer) -> tokenizers.Tokenizer:
    description = json.loads(backend.to_str())
    return tokenizers.Tokenizer.from_str(json.dumps({**description, "added_tokens": [], "post_processor": None}))


def _slow_encoders(hf: "PreTrainedTokenizerBase") -> tuple[_Encode, Callable[[str], list[int]]]:
    lock = threading.Lock()

    def encode(text: str, add_special_tokens: bool) -> list[int]:
        with lock:
            return list(hf.encode(text, add_special_tokens=add_special_tokens))

    def encode_literal(text: str) -> list[int]:
        with lock:
            return list(hf.encode(text, add_special_tokens=False, split_special_tokens=True))

    return encode, encode_literal
