"""Which pipeline a request goes to: the one with the longest cached prefix, unless its backlog is too long.

Each pipeline has a cost, in tokens: what waits there to be computed, plus some for each open request, less twice what
the request would find in the prefix cache; the cheapest is chosen. So a cached prefix is followed until the pipeline
that has it lags the least loaded one by twice the tokens saved. Twice, as they are saved for all who wait there.

What pipelines report is a second or two old. To it comes what was sent from here that the report does not know of and
that has not been answered: a burst spreads at once, and requests with one prefix meet from the first one on.
"""

from collections import OrderedDict, deque
from collections.abc import Callable, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from rayserve_sarathi.kv.prefix_marks import PrefixMarks, unpack_marks

_PREFIX_FACTOR = 2.0
_OPEN_REQUEST_TOKENS = 8
"""An open request costs a token of every step; with this, a short prefix that all share does not gather all of them."""
_LOST_S = 10.0
"""A call that no report knows of after this long never came there."""
_MEMORY_S = 30.0
"""A prompt that was sent somewhere is taken for cached there this long; by then the reports show it, if it is."""
_MAX_REMEMBERED = 8192
_MAX_CALL_SIZE = 8
"""A call goes to one pipeline as a whole, so that more requests than this would not spread."""

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prompt:
    """What is to be routed."""

    num_tokens: int
    prefix: PrefixMarks


@dataclass(slots=True, eq=False)
class Call:
    """One call that brings requests; an ingress numbers its calls from 1, to whichever pipeline they go.

    The ingress counts its requests as they join and are answered, which the router of its process sees; a pipeline gets
    a copy.
    """

    ingress: str
    number: int
    num_waiting: int = 0
    """Requests without an output."""
    num_open: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineReport:
    """What a pipeline says of itself, every second or so."""

    is_ready: bool = True
    """Whether it computes; one that is being rebuilt does not."""
    prefill_backlog_tokens: int = 0
    num_open_requests: int = 0
    last_calls: Mapping[str, int] = field(default_factory=dict)
    """Number of the last call from each ingress; what it and those before it brought is in the other figures."""
    marks: bytes = b""
    """See `BlockManager.pack_marks`."""

    def knows(self, call: Call) -> bool:
        """Return whether a call that was sent there is in the report."""
        return call.number <= self.last_calls.get(call.ingress, 0)


def group_by_prefix(items: Iterable[_T], prefix_of: Callable[[_T], PrefixMarks]) -> list[list[_T]]:
    """Divide what goes out at one moment into calls: requests with the same beginning together, few in a call."""
    groups: dict[tuple[bytes, ...], list[_T]] = {}
    for item in items:
        groups.setdefault(prefix_of(item).marks[:1], []).append(item)
    return [
        group[start : start + _MAX_CALL_SIZE]
        for group in groups.values()
        for start in range(0, len(group), _MAX_CALL_SIZE)
    ]


@dataclass(frozen=True, slots=True)
class _Sent:
    call: Call
    at_s: float
    num_tokens: float
    """To be computed, of each request."""

    def cost(self) -> float:
        return self.num_tokens * self.call.num_waiting + _OPEN_REQUEST_TOKENS * self.call.num_open


class _Pipeline:
    """What is known of one pipeline."""

    def __init__(self) -> None:
        self.report = PipelineReport()
        self.reported_marks: frozenset[bytes] = frozenset()
        self.sent: deque[_Sent] = deque()
        """What its report does not know of yet."""
        self.remembered: OrderedDict[bytes, float] = OrderedDict()
        """Marks of what was sent there, oldest first, and when."""
        self.last_used = 0

    def __contains__(self, mark: object) -> bool:
        return mark in self.reported_marks or mark in self.remembered


class PipelineChooser:
    """What one ingress knows of all pipelines, by name.

    Args:
        clock: Seconds, monotonic.
    """

    def __init__(self, *, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._pipelines: dict[str, _Pipeline] = {}
        self._num_chosen = 0

    def update(self, reports: Mapping[str, PipelineReport]) -> None:
        """Take the newest report of every pipeline there is; those that are not named are gone."""
        self._pipelines = {name: self._pipelines.get(name) or _Pipeline() for name in reports}
        for name, report in reports.items():
            pipeline = self._pipelines[name]
            if report.marks != pipeline.report.marks:
                pipeline.reported_marks = unpack_marks(report.marks)
            pipeline.report = report
            pipeline.sent = deque(sent for sent in pipeline.sent if sent.call.num_open and not report.knows(sent.call))

    def choose(self, names: Sequence[str], prompts: Sequence[Prompt], *, call: Call | None) -> str:
        """Return which of `names` (at least one) is to compute the prompts.

        Args:
            names: Pipelines that take calls.
            prompts: What is to be computed; none if something is only asked.
            call: What brings the prompts, which then count as sent there; None if something is only asked.
        """
        now_s = self._clock()
        for name in names:
            self._forget_old(self._pipelines.setdefault(name, _Pipeline()), now_s)
        ready = [name for name in names if self._pipelines[name].report.is_ready]
        saved = {name: _num_saved(prompts, self._pipelines[name]) for name in ready or names}
        # Where all is equal, the one that was used longest ago: different prefixes then use all caches.
        chosen = min(saved, key=lambda name: (self._cost(name, saved[name]), self._pipelines[name].last_used))
        if call is not None:
            self._note(self._pipelines[chosen], call, prompts, num_saved=saved[chosen], now_s=now_s)
        return chosen

    def _cost(self, name: str, num_saved: int) -> float:
        pipeline = self._pipelines[name]
        report = pipeline.report
        backlog = report.prefill_backlog_tokens + sum(sent.cost() for sent in pipeline.sent)
        return backlog + _OPEN_REQUEST_TOKENS * report.num_open_requests - _PREFIX_FACTOR * num_saved

    def _note(
        self, pipeline: _Pipeline, call: Call, prompts: Sequence[Prompt], *, num_saved: int, now_s: float
    ) -> None:
        self._num_chosen += 1
        pipeline.last_used = self._num_chosen
        num_tokens = sum(prompt.num_tokens for prompt in prompts) - num_saved
        pipeline.sent.append(_Sent(call, now_s, num_tokens / len(prompts)))
        for prompt in prompts:
            for mark in prompt.prefix.marks:
                pipeline.remembered[mark] = now_s
                pipeline.remembered.move_to_end(mark)

    def _forget_old(self, pipeline: _Pipeline, now_s: float) -> None:
        while pipeline.sent and pipeline.sent[0].at_s < now_s - _LOST_S:
            pipeline.sent.popleft()
        remembered = pipeline.remembered
        while remembered and (len(remembered) > _MAX_REMEMBERED or next(iter(remembered.values())) < now_s - _MEMORY_S):
            remembered.popitem(last=False)


def _num_saved(prompts: Sequence[Prompt], known: Container[bytes]) -> int:
    return sum(prompt.prefix.num_known_tokens(known) for prompt in prompts)
