"""What an ingress and a scheduler say to each other."""

import pickle
from array import array
from collections.abc import Callable
from dataclasses import dataclass, field

from rayserve_sarathi.errors import SarathiError
from rayserve_sarathi.kv.prefix_marks import PrefixMarks
from rayserve_sarathi.request import RequestOutput, SamplingParams


@dataclass(frozen=True, slots=True, kw_only=True)
class Submission:
    """A request on its way to a scheduler."""

    request_id: str
    prompt_token_ids: "array[int]"
    sampling: SamplingParams
    cache_salt: str = ""
    output_token_ids: "array[int]" = field(default_factory=lambda: array("i"))
    """What an earlier scheduler generated, of a request whose pipeline was lost."""
    prefix: PrefixMarks = field(default_factory=PrefixMarks)
    """What the router compares with what each pipeline has cached."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SubmitReply:
    """Which pipeline took the requests of a call, and which of them it refused.

    Refusals travel as values: as exceptions they would come back wrapped, one for a whole call.
    """

    pipeline: str
    refusals: dict[str, SarathiError]
    """By request id."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OutputBatch:
    """All that happened to an ingress's requests since its last batch: one message a step, not one a token."""

    outputs: list[RequestOutput]
    num_waiting: int
    """Requests that wait at this scheduler, of all ingresses."""

    def __reduce__(self) -> tuple[Callable[[bytes, int], "OutputBatch"], tuple[bytes, int]]:
        """Pickle the outputs as plain tuples, in C: Ray's pickler calls Python for each object of a class."""
        return _unpickle_batch, (pickle.dumps([tuple(output) for output in self.outputs]), self.num_waiting)


def _unpickle_batch(outputs: bytes, num_waiting: int) -> OutputBatch:
    return OutputBatch(outputs=[RequestOutput(*fields) for fields in pickle.loads(outputs)], num_waiting=num_waiting)
