"""Why a token came later than the target: one cause for each gap, the one without which it would have been in time.

- `rebuild`: the pipeline had failed, and what was computed was computed again.
- `kv_wait`: the request was preempted, or stood still, for want of KV blocks, and waited for most of the gap.
- `recompute`: it was preempted, and computing its KV again took most of the gap.
- `prefill`: chunks of prompts in the token's step, or in the steps since its last one.
- `slow_stage`: its step took longer than its content explains.
- `bubble`: the request waited for its turn though its step was not held up by others' prompts.
- `decodes`: none of these: the decodes of the step are too many, or their contexts too long, for the target.
- `slow_reader`: it was there in time, but could not be sent, as the client did not read; whoever sends it says so.
"""

from collections import Counter, OrderedDict, deque
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import NamedTuple

from rayserve_sarathi.request import Request
from rayserve_sarathi.scheduling.forecast import ExpectedStep

_MAX_REQUESTS = 512
_MAX_GAPS = 16
_MAX_STEPS = 64


class LateGap(NamedTuple):
    """One gap above the target.

    Args:
        position: Of the token that was late, counted from the first one generated, which is 0.
        gap_s: Time since the token before; of a slow reader, that for which it could not be sent.
        cause: See the module.
        culprit: Request whose prompt was computed meanwhile, if that is the cause; of several the one with most tokens.
    """

    position: int
    gap_s: float
    cause: str
    culprit: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class LateReport:
    """What was late of one request.

    Args:
        request_id: The scheduler's name of it.
        tbt_s: The target.
        num_late: Gaps above it, by cause.
        gaps: The last of them, oldest first.
    """

    request_id: str
    tbt_s: float
    num_late: dict[str, int]
    gaps: tuple[LateGap, ...]


@dataclass(eq=False)
class _LateRequest:
    num_late: Counter[str] = field(default_factory=Counter)
    gaps: deque[LateGap] = field(default_factory=lambda: deque(maxlen=_MAX_GAPS))


class _Passed(NamedTuple):
    back_s: float
    chunks_s: float
    culprit: str | None


class LateTokens:
    """Finds and counts the gaps above the target.

    Args:
        tbt_s: The target.
    """

    def __init__(self, tbt_s: float) -> None:
        self.tbt_s = tbt_s
        self._requests: OrderedDict[str, _LateRequest] = OrderedDict()
        self._passed: deque[_Passed] = deque(maxlen=_MAX_STEPS)
        self._interruptions: dict[str, str] = {}

    def interrupt(self, request: Request, cause: str) -> None:
        """Note that a request was preempted (`recompute`), stands still (`kv_wait`) or lost its KV (`rebuild`)."""
        if request.last_token_s is not None and self._interruptions.get(request.request_id) != "rebuild":
            self._interruptions[request.request_id] = cause

    def forget(self, request: Request) -> None:
        """Note that a request has ended; its report remains for a while."""
        self._interruptions.pop(request.request_id, None)

    def reports(self, request_id: str) -> list[LateReport]:
        """Return what was late of a request, or of each that was made of it (`<id>-<index>`, `<id>~<attempt>`).

        None for those of which nothing was late, and for those that are forgotten: the last 512 late ones are kept.
        """
        return [
            LateReport(request_id=name, tbt_s=self.tbt_s, num_late=dict(request.num_late), gaps=tuple(request.gaps))
            for name, request in self._requests.items()
            if name == request_id or name.startswith((f"{request_id}-", f"{request_id}~"))
        ]

    def note(self, request_id: str, gap: LateGap) -> None:
        """Add a gap to the report of a request, which may have ended."""
        late = self._requests.get(request_id)
        if late is None:
            if len(self._requests) >= _MAX_REQUESTS:
                self._requests.popitem(last=False)
            late = self._requests[request_id] = _LateRequest()
        late.num_late[gap.cause] += 1
        late.gaps.append(gap)

    def land(
        self, step: ExpectedStep, requests: Iterable[Request], *, culprit: str | None, now_s: float
    ) -> Counter[str]:
        """Look at the requests that get a token from a step that is back; return the late ones by cause.

        Args:
            step: As it was expected.
            requests: Before their token is counted.
            culprit: The request with the longest chunk in it.
            now_s: When it came back.
        """
        causes: Counter[str] = Counter()
        latest_s = now_s - self.tbt_s
        for request in requests:
            last_s = request.last_token_s
            if last_s is None or request.is_aborted:
                continue
            interruption = self._interruptions.pop(request.request_id, None) if self._interruptions else None
            if last_s >= latest_s:
                continue
            cause, blamed = self._cause(request, last_s, step, interruption, culprit, now_s)
            causes[cause] += 1
            self.note(request.request_id, LateGap(request.num_output_tokens, now_s - last_s, cause, blamed))
        self._passed.append(_Passed(now_s, max(step.period_s - step.decodes_s, 0.0), culprit))
        return causes

    def _cause(
        self,
        request: Request,
        last_s: float,
        step: ExpectedStep,
        interruption: str | None,
        culprit: str | None,
        now_s: float,
    ) -> tuple[str, str | None]:
        if interruption == "recompute":
            waited_s = (request.admitted_s or last_s) - last_s
            return ("kv_wait" if waited_s > (now_s - last_s) / 2 else "recompute"), None
        if interruption is not None:
            return interruption, None
        between = [passed for passed in self._passed if passed.back_s > last_s]
        chunks_s = {culprit: max(step.period_s - step.decodes_s, 0.0)}
        for passed in between:
            chunks_s[passed.culprit] = chunks_s.get(passed.culprit, 0.0) + passed.chunks_s
        prefill_s = sum(chunks_s.values())
        slow_s = max(now_s - step.submit_s - step.expected_s, 0.0)
        # Without the steps of others that returned meanwhile, whose prompts are counted above.
        waited_s = max(step.submit_s - last_s - prefill_s, 0.0)
        parts = [("prefill", prefill_s), ("slow_stage", slow_s), ("bubble", waited_s)]
        cause, part_s = max(parts, key=lambda part: part[1])
        if sum(part_s for _, part_s in parts) < now_s - last_s - self.tbt_s or part_s <= 0:
            return "decodes", None
        return cause, max(chunks_s, key=lambda name: chunks_s[name]) if cause == "prefill" else None


def longest_chunk(prefills: "dict[Request, int]") -> str | None:
    """Return the id of the request with most tokens; None if there is none."""
    if not prefills:
        return None
    return max(prefills, key=lambda request: prefills[request]).request_id
