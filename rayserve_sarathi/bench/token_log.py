"""When the tokens of one stream came.

A chunk is not a token: a server may send what several steps made in one chunk, or hold back half a character. With
`stream_options.continuous_usage_stats` each chunk says how many tokens there are by then, and every token gets the time
of the chunk that told of it. Servers that do not know this option tell the total at the end (`include_usage`). Then a
chunk counts as one token, and those that the total has beyond these came together with others: wherever that was, it
makes gaps of 0 and leaves the gaps between chunks as they are, so the set of gaps is right also then.
"""

import json
from array import array
from typing import Any

from rayserve_sarathi.bench.outcome import Failure, FailureKind

_DONE = b"[DONE]"
_SHOWN_CHARS = 200


class TokenLog:
    """Reads the events of one stream of `/v1/completions`."""

    def __init__(self) -> None:
        self.times_s = array("d")
        """When each token came."""
        self.num_prompt_tokens: int | None = None
        """By the server's usage; None until it tells one."""
        self.is_complete = False
        """Whether the stream has said that it ends: by [DONE], or by a finish reason, as transformers' server does."""
        self.failure: Failure | None = None
        """What the stream itself says went wrong."""
        self._num_tokens_told: int | None = None

    @property
    def has_usage(self) -> bool:
        """Whether the server told how many tokens it made."""
        return self._num_tokens_told is not None

    @property
    def num_tokens(self) -> int:
        """Tokens by the server's count, by ours if it told none."""
        return len(self.times_s) if self._num_tokens_told is None else self._num_tokens_told

    def push(self, event: bytes, now_s: float) -> None:
        """Read the data of one event that arrived at `now_s`."""
        if event == _DONE:
            self.is_complete = True
            return
        try:
            chunk = json.loads(event)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            self._fail(FailureKind.MALFORMED, f"no JSON object: {event[:_SHOWN_CHARS]!r}")
        elif chunk.get("error") is not None:
            self._fail(FailureKind.ERROR_EVENT, _message(chunk["error"]))
        else:
            self._count(chunk, now_s)

    def _count(self, chunk: dict[str, Any], now_s: float) -> None:
        choices = chunk.get("choices")
        choice = choices[0] if isinstance(choices, list) and choices and isinstance(choices[0], dict) else None
        self.is_complete |= choice is not None and choice.get("finish_reason") is not None
        told = self._read_usage(chunk.get("usage"))
        if told is not None:
            self._num_tokens_told = told
            # The total in a chunk of its own is news about tokens that came before.
            time_s = now_s if choice is not None or not self.times_s else self.times_s[-1]
            self.times_s.extend([time_s] * (told - len(self.times_s)))
        elif choice is not None and (choice.get("text") or not self.times_s):
            self.times_s.append(now_s)

    def _read_usage(self, usage: object) -> int | None:
        if not isinstance(usage, dict):
            return None
        num_prompt_tokens, told = usage.get("prompt_tokens"), usage.get("completion_tokens")
        if isinstance(num_prompt_tokens, int):
            self.num_prompt_tokens = num_prompt_tokens
        return told if isinstance(told, int) else None

    def _fail(self, kind: FailureKind, message: str) -> None:
        if self.failure is None:
            self.failure = Failure(kind=kind, message=message)


def _message(error: object) -> str:
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)[:_SHOWN_CHARS]
