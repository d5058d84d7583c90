"""What became of one request, as its client saw it."""

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class FailureKind(StrEnum):
    """How a request failed."""

    CONNECT = "connect"
    """No connection could be made."""
    STATUS = "status"
    """The server refused it with an HTTP status."""
    ERROR_EVENT = "error_event"
    """The server reported an error inside the stream."""
    DISCONNECT = "disconnect"
    """The stream ended before its end."""
    TIMEOUT = "timeout"
    """The client waited no longer."""
    MALFORMED = "malformed"
    """What came is no stream of completions."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Failure:
    """Why a request has no complete answer."""

    kind: FailureKind
    message: str
    status: int | None = None
    """The HTTP status; None if there was none, or it was 200."""
    retry_after_s: float | None = None
    """When the server says to come back; None if it does not say."""

    @property
    def label(self) -> str:
        """Its kind for counting, such as `status 429`."""
        return self.kind.value if self.status is None else f"{self.kind.value} {self.status}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What became of one request. Times are seconds of the client's monotonic clock.

    A stream delivers chunks, and a chunk may hold several tokens. All tokens of a chunk have its time, so that between
    them the gap is 0, which is what whoever reads the stream sees.
    """

    num_prompt_tokens: int
    """By the server's usage; what was sent, if it tells none."""
    num_tokens_asked: int
    num_output_tokens: int
    """By the server's usage; number of chunks with text, if it tells none."""
    due_s: float
    """When it should have been sent."""
    sent_s: float
    """Before a connection was made for it, where none was open."""
    end_s: float
    token_times_s: Sequence[float]
    """When each token came, in order."""
    has_usage: bool = True
    """Whether the server told numbers of tokens; if not, chunks are counted."""
    failure: Failure | None = None
    """None if it is complete."""

    @property
    def ttft_s(self) -> float:
        """Time from sending to the first token; only of a request with tokens."""
        return self.token_times_s[0] - self.sent_s

    @property
    def e2e_s(self) -> float:
        """Time from sending to the last token; only of a request with tokens."""
        return self.token_times_s[-1] - self.sent_s
