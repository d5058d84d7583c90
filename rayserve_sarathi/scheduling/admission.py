"""What comes before a request runs: whether it can ever be served, and the queue in which it waits."""

from bisect import insort
from collections import OrderedDict, deque
from collections.abc import Iterator
from math import ceil

import numpy as np

from rayserve_sarathi.errors import ContextLengthError, InvalidRequestError, OverloadedError
from rayserve_sarathi.request import Request

_RATE_WINDOW_S = 60.0
_RETRY_AFTER_UNKNOWN_S = 5.0


def check_request(request: Request, *, max_model_len: int, vocab_size: int) -> None:
    """Return if a request can be served.

    Raises:
        ContextLengthError: It is longer than the model's context.
        InvalidRequestError: It names a token that the model does not have, or has all its tokens already.
    """
    sampling = request.sampling
    if request.max_num_tokens > max_model_len:
        raise ContextLengthError(
            f"This model's maximum context length is {max_model_len} tokens. However, you requested"
            f" {request.max_num_tokens} tokens ({request.num_prompt_tokens} in the prompt,"
            f" {sampling.max_tokens} for the completion).",
            param="max_tokens",
        )
    biased = [token_id for token_id, _ in sampling.logit_bias]
    for name, token_ids in (
        ("prompt", np.frombuffer(request.token_ids, dtype=np.int32)),
        ("logit_bias", np.array(biased, dtype=np.int32)),
        ("stop_token_ids", np.array(sampling.stop_token_ids, dtype=np.int32)),
    ):
        if len(token_ids) and not (token_ids.min() >= 0 and token_ids.max() < vocab_size):
            wrong = next(token_id for token_id in token_ids if not 0 <= token_id < vocab_size)
            raise InvalidRequestError(
                f"{name} holds token id {wrong}; the model's are 0 to {vocab_size - 1}", param=name
            )
    if sampling.min_tokens and len(request.stop_token_ids) >= vocab_size:
        raise InvalidRequestError(
            "min_tokens forbids the tokens that end a text, and stop_token_ids makes all tokens such; name fewer",
            param="stop_token_ids",
        )
    if sampling.max_tokens and request.num_tokens >= request.max_num_tokens:
        raise InvalidRequestError(
            f"{request.num_output_tokens} of at most {sampling.max_tokens} tokens are generated already",
            param="max_tokens",
        )


class RequestQueue:
    """Requests that do not run, in order of arrival: the preempted ones, all of which are older, and the new ones.

    Args:
        max_num_waiting: Most new ones.
    """

    def __init__(self, max_num_waiting: int) -> None:
        self._max_num_waiting = max_num_waiting
        self._new: OrderedDict[str, Request] = OrderedDict()
        self._preempted: list[Request] = []
        self._recent_finishes_s: deque[float] = deque(maxlen=64)

    def __len__(self) -> int:
        return len(self._new) + len(self._preempted)

    def __iter__(self) -> Iterator[Request]:
        yield from self._preempted
        yield from self._new.values()

    @property
    def num_new(self) -> int:
        """Requests that have never run."""
        return len(self._new)

    def check_capacity(self, num_requests: int, now_s: float) -> None:
        """Return if there is room for `num_requests` more.

        Raises:
            OverloadedError: There is none; `retry_after_s` is when half of the queue will have left at the rate of the
                last minute.
            InvalidRequestError: There never is.
        """
        if num_requests > self._max_num_waiting:
            raise InvalidRequestError(
                f"{num_requests} sequences (prompts times n) in one request are more than the queue of"
                f" {self._max_num_waiting} holds; send fewer at once",
                param="n",
            )
        if len(self._new) + num_requests > self._max_num_waiting:
            raise OverloadedError(
                f"{len(self._new)} requests are waiting and at most {self._max_num_waiting} may; try again later",
                retry_after_s=self._retry_after_s(now_s),
            )

    def add(self, request: Request) -> None:
        """Take a new request, the newest of all."""
        self._new[request.request_id] = request

    def put_back(self, request: Request) -> None:
        """Take a request that ran."""
        insort(self._preempted, request, key=order_of)

    def oldest(self) -> Request | None:
        """Return the request whose turn it is."""
        if self._preempted:
            return self._preempted[0]
        return next(iter(self._new.values()), None)

    def remove(self, request: Request) -> bool:
        """Take a request out; return whether it was there."""
        if self._new.pop(request.request_id, None) is not None:
            return True
        if request in self._preempted:
            self._preempted.remove(request)
            return True
        return False

    def note_finish(self, now_s: float) -> None:
        """Hear that a request has ended, which is what the queue's pace is measured by."""
        self._recent_finishes_s.append(now_s)

    def forget_finishes(self) -> None:
        """Measure the pace anew."""
        self._recent_finishes_s.clear()

    def _retry_after_s(self, now_s: float) -> float:
        recent_s = [finish_s for finish_s in self._recent_finishes_s if finish_s > now_s - _RATE_WINDOW_S]
        if not recent_s:
            return _RETRY_AFTER_UNKNOWN_S
        rate = len(recent_s) / max(now_s - recent_s[0], 1.0)
        return float(min(max(ceil(len(self._new) / 2 / rate), 1), _RATE_WINDOW_S))


def order_of(request: Request) -> int:
    """Return its place in the order of arrival."""
    return request.order
