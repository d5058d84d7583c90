"""Outcomes made by hand."""

from collections.abc import Sequence

from rayserve_sarathi.bench.outcome import Failure, FailureKind, Outcome


def make_outcome(
    token_times_s: Sequence[float],
    *,
    sent_s: float = 0.0,
    due_s: float | None = None,
    end_s: float | None = None,
    prompt: int = 10,
    asked: int | None = None,
    has_usage: bool = True,
    failure: Failure | None = None,
) -> Outcome:
    """Make one; it ends with its last token, and asked for as many tokens as it has, unless something else is said."""
    last_s = token_times_s[-1] if token_times_s else sent_s
    return Outcome(
        num_prompt_tokens=prompt,
        num_tokens_asked=len(token_times_s) if asked is None else asked,
        num_output_tokens=len(token_times_s),
        due_s=sent_s if due_s is None else due_s,
        sent_s=sent_s,
        end_s=last_s if end_s is None else end_s,
        token_times_s=token_times_s,
        has_usage=has_usage,
        failure=failure,
    )


FULL = Failure(kind=FailureKind.STATUS, status=429, message="the queue is full", retry_after_s=3.0)
LATE = Failure(kind=FailureKind.TIMEOUT, message="no complete answer in 9 s")
