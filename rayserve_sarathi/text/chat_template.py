"""Chats to tokens, such that no message can write a control token.

The template is rendered with a private marker in the place of each control token's string inside a message; the
rendered text is then split at the markers, and the strings they stand for are encoded as ordinary text. A chat without
such a string gives exactly the tokens of the tokenizer's own `apply_chat_template`.
"""

import itertools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2.exceptions import TemplateError

from rayserve_sarathi.errors import InvalidRequestError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Message = Mapping[str, str]
"""`role`, `content` and perhaps `name`."""
Variables = Mapping[str, str | int | float | bool | None]

_MAX_LITERALS = 10_000
"""Each is encoded by itself, which costs far more than ordinary text."""
_MARKER_START = "\ue000"
_MARKER_END = "\ue001"
_RESERVED_VARIABLES = {
    "add_generation_prompt",
    "chat_template",
    "continue_final_message",
    "conversation",
    "documents",
    "max_length",
    "messages",
    "padding",
    "return_assistant_tokens_mask",
    "return_dict",
    "return_tensors",
    "sanitize_control_tokens",
    "tokenize",
    "tokenizer_kwargs",
    "tools",
    "truncation",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class ChatOptions:
    """How to render a chat."""

    add_generation_prompt: bool = True
    """Whether the text ends with the header of an assistant message."""
    continue_final_message: bool = False
    """Whether the model goes on with the last message."""
    variables: Variables = field(default_factory=dict)
    """Further variables of the template."""

    def __post_init__(self) -> None:
        if self.add_generation_prompt and self.continue_final_message:
            raise InvalidRequestError(
                "continue_final_message needs add_generation_prompt false", param="continue_final_message"
            )
        if reserved := self.variables.keys() & _RESERVED_VARIABLES:
            raise InvalidRequestError(f"{sorted(reserved)} cannot be set", param="chat_template_kwargs")


@dataclass(frozen=True, slots=True)
class Piece:
    """A part of a rendered chat."""

    text: str
    is_literal: bool
    """Whether control tokens in it are ordinary text, as a client wrote them."""


class ChatTemplate:
    """Renders chats with a tokenizer's template.

    Args:
        hf: A tokenizer that has a chat template.
    """

    def __init__(self, hf: "PreTrainedTokenizerBase") -> None:
        self._hf = hf
        template = hf.get_chat_template()
        special = {token.content for token in hf.added_tokens_decoder.values() if token.special}
        # A checkpoint may leave its control tokens unmarked; those that its template writes are control tokens as well.
        # Runs of white space (Gemma, Falcon) are not, though templates hold them.
        written = {
            token.content
            for token in hf.added_tokens_decoder.values()
            if token.content in template and not token.content.isspace()
        }
        self._control = _any_of(special | written)
        # Templates take an assistant's own `<think>` and the like apart, so there only special tokens are literal.
        self._control_of_assistant = _any_of(special)

    def render(self, messages: Sequence[Message], options: ChatOptions) -> list[Piece]:
        """Return the text of a chat.

        Raises:
            InvalidRequestError: The template refuses these messages.
        """
        nonce = _unused_marker(messages, options)
        literals: list[str] = []

        def mark(match: re.Match[str]) -> str:
            if len(literals) == _MAX_LITERALS:
                problem = f"the messages hold more than {_MAX_LITERALS} strings that are control tokens of this model"
                raise InvalidRequestError(problem, param="messages")
            literals.append(match[0])
            return f"{nonce}{len(literals) - 1}{_MARKER_END}"

        marked = [self._mark_message(message, mark) for message in messages]
        variables = {
            name: self._control.sub(mark, value) if isinstance(value, str) else value
            for name, value in options.variables.items()
        }
        text = self._apply(marked, options, variables)
        parts = re.split(f"{nonce}([0-9]+){_MARKER_END}", text)
        pieces = [
            Piece(literals[int(part)], is_literal=True) if place % 2 else Piece(part, is_literal=False)
            for place, part in enumerate(parts)
        ]
        return [piece for piece in pieces if piece.text]

    def _mark_message(self, message: Message, mark: Callable[[re.Match[str]], str]) -> dict[str, str]:
        control = self._control_of_assistant if message["role"] == "assistant" else self._control
        return {**message, "content": control.sub(mark, message["content"])}

    def _apply(self, messages: list[dict[str, str]], options: ChatOptions, variables: dict[str, Any]) -> str:
        try:
            text = self._hf.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=options.add_generation_prompt,
                continue_final_message=options.continue_final_message,
                **variables,
            )
        except TemplateError as error:
            raise InvalidRequestError(f"the chat template refuses these messages: {error}", param="messages") from error
        except (TypeError, ValueError) as error:
            param = "chat_template_kwargs" if variables else "messages"
            raise InvalidRequestError("the chat template cannot render these messages", param=param) from error
        assert isinstance(text, str), type(text)
        return text


def _unused_marker(messages: Sequence[Message], options: ChatOptions) -> str:
    texts = [message["content"] for message in messages]
    texts += [value for value in options.variables.values() if isinstance(value, str)]
    used = {number for text in texts for number in re.findall(f"{_MARKER_START}([0-9]+):", text)}
    free = next(number for number in itertools.count() if str(number) not in used)
    return f"{_MARKER_START}{free}:"


def _any_of(strings: set[str]) -> re.Pattern[str]:
    if not strings:
        return re.compile(r"(?!)")  # matches nothing
    return re.compile("|".join(re.escape(string) for string in sorted(strings, key=len, reverse=True)))
