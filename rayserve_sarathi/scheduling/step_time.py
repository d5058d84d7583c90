"""How long a step takes, learnt from the steps that came back.

The time of a step is taken for a sum of parts, none of which is negative: a constant; the linear layers, flat in the
number of tokens up to a knee and linear beyond it (Sarathi-Serve, OSDI'24, section 3.1), which hinges at a few numbers
of tokens approximate; the decodes; the KV that is read; and the attention of chunks. A device computes whole tiles of
tokens, and so many of them at once: with a few tiles more the last round may be nearly empty, so that five of them take
as long as six. So a factor is learnt for each number of tiles. With the same number, a prediction never falls as
tokens are added.

The parts are fitted by least squares of relative errors, with older steps forgotten, under the condition that none is
negative (a few sweeps of coordinate descent from the last solution). Two things keep the fit sound where the steps of
a moment are all alike: steps of different sizes are forgotten apart, and a prior stands for what was never seen. Only
the prior's shape counts: it is scaled to the steps that came back, so it may be wrong by any factor.

Dimensions: F parts; Z sizes of step. The normal equations of a fit are [F, F + 1]: the matrix, and the vector as its
last column.
"""

import math
from collections import deque
from collections.abc import Sequence
from itertools import product
from operator import mul
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from rayserve_sarathi.step_shape import StepShape, StepTimeModel

TILE = 128
"""Tokens that a matrix product computes at once: a step of one more costs a whole tile more."""
_NUM_FACTORS = 65
"""Numbers of tiles with a factor of their own; those above share the last."""
_MAX_FACTOR = 4 / 3
"""What a tile too many costs at most; the rest of an error is not the tiles'."""
_KNOTS = (64, 128, 256, 512, 1024)
"""Numbers of tokens at which the linear layers' time per token may begin to grow."""
_NUM_PARTS = 5 + len(_KNOTS)
_MEMORY_STEPS = 20
"""Steps of one size after which a step counts 1/e."""
_PRIOR_STEPS = 3.0
"""How many steps the prior counts for."""
_MAX_SURPRISE = 3.0
"""A step counts as at most so many times, and at least this fraction of, what was predicted."""
_NUM_TRUSTED = 8
"""Steps after which a prediction is good enough to tell an outlier."""
_NUM_SWEEPS = 2
_NUM_SIZES = 12
_TYPICAL_STEP_S = 0.02

_Float64Array = npt.NDArray[np.float64]


class StepLoad(NamedTuple):
    """What the time of a step depends on.

    A NamedTuple, as a choice of budget makes a dozen of them.
    """

    num_tokens: int
    num_decodes: int
    context_tokens: int
    """Tokens whose KV is read: the contexts of all requests in the step."""
    chunk_work: float
    """Pairs of query and key in the attention of the chunks."""


def load_of(shape: StepShape) -> StepLoad:
    """Return what the time of a step of this shape depends on."""
    return StepLoad(
        shape.num_tokens,
        shape.num_decodes,
        shape.decode_context_tokens + sum([context_len for _, context_len in shape.chunks]),
        sum([attention_work(query_len, context_len) for query_len, context_len in shape.chunks]),
    )


def attention_work(query_len: int, context_len: int) -> float:
    """Return the pairs of query and key in a chunk's attention."""
    return query_len * (context_len + query_len / 2)


class FittedStepTime:
    """Predicts the time of a step.

    Args:
        prior: What is believed before any step came back, in proportion; see `prior_times`.
    """

    def __init__(self, prior: Sequence[tuple[StepLoad, float]]) -> None:
        self.num_observed = 0
        self._log_ratios: deque[float] = deque(maxlen=_MEMORY_STEPS)
        self._log_scale = 0.0
        self._prior = _PRIOR_STEPS * np.mean([_equations(load, time_s, time_s) for load, time_s in prior], axis=0)
        self._factors = [_Factor() for _ in range(_NUM_FACTORS)]
        self._sizes = np.zeros((_NUM_SIZES, _NUM_PARTS, _NUM_PARTS + 1))
        self._parts = [0.0] * _NUM_PARTS
        for _ in range(200):
            _solve(self._parts, self._prior)
        self._prior_parts = list(self._parts)

    def predict_s(self, load: StepLoad) -> float:
        """Return the time of a step."""
        return _sum_of(self._parts, load) * self._factor(load).value

    def observe(self, load: StepLoad, time_s: float) -> None:
        """Learn from a step that took `time_s`, which is above 0."""
        self._observe_scale(load, time_s)
        predicted_s = self.predict_s(load)
        if self.num_observed >= _NUM_TRUSTED:
            time_s = min(max(time_s, predicted_s / _MAX_SURPRISE), predicted_s * _MAX_SURPRISE)
        self.num_observed += 1
        # Relative to the prediction: relative to themselves, short times would count for more than long ones.
        unit_s = min(max(predicted_s, time_s / _MAX_SURPRISE), time_s * _MAX_SURPRISE)
        # Decode-only steps come by the thousand between two prompts, which must not be forgotten meanwhile.
        size = self._sizes[min((load.num_tokens - load.num_decodes).bit_length(), _NUM_SIZES - 1)]
        size *= 1 - 1 / _MEMORY_STEPS
        size += _equations(load, time_s, unit_s)
        scale = math.exp(self._log_scale)
        equations = self._prior / scale
        equations[:, :-1] /= scale
        equations += self._sizes.sum(axis=0)
        _solve(self._parts, equations)
        self._factor(load).learn(time_s / _sum_of(self._parts, load))

    @property
    def knee(self) -> float:
        """Tokens whose own time equals what a step costs whatever is in it: fewer waste the latter."""
        per_token_s = self._parts[1] + sum(self._parts[5:])
        return self._parts[0] / per_token_s if per_token_s > 0 else math.inf

    def _factor(self, load: StepLoad) -> "_Factor":
        return self._factors[min(-(-load.num_tokens // TILE), _NUM_FACTORS - 1)]

    def _observe_scale(self, load: StepLoad, time_s: float) -> None:
        """Learn by which factor the prior is wrong: the median of the last steps, so that a slow first one is none."""
        self._log_ratios.append(math.log(time_s / _sum_of(self._prior_parts, load)))
        self._log_scale = sorted(self._log_ratios)[(len(self._log_ratios) - 1) // 2]


class _Factor:
    """By how many times as long steps of one number of tiles take than the sum of the parts says."""

    def __init__(self) -> None:
        self.value = 1.0
        self._weight = 0.0
        self._sum = 0.0

    def learn(self, ratio: float) -> None:
        if not 1 / _MAX_FACTOR < ratio < _MAX_FACTOR:
            return
        self._weight += 1 - self._weight / _MEMORY_STEPS
        self._sum += math.log(ratio) - self._sum / _MEMORY_STEPS
        self.value = math.exp(self._sum / (self._weight + _PRIOR_STEPS))


def prior_times(model: StepTimeModel | None) -> list[tuple[StepLoad, float]]:
    """Return what a model says of steps of many sizes, to begin with.

    Args:
        model: Any; None stands for a device of which nothing is known but that its linear layers have a knee.
    """
    shapes = [
        StepShape(
            num_decodes=num_decodes,
            decode_context_tokens=num_decodes * context_len,
            chunks=((chunk, context_len),) if chunk else (),
            num_samples=num_decodes,
        )
        for num_decodes, chunk, context_len in product(
            (0, 1, 16, 64, 256), (0, 64, 128, 256, 512, 1024, 4096), (256, 4096)
        )
        if num_decodes + chunk
    ]
    if model is None:
        return [(load := load_of(shape), _typical_s(load)) for shape in shapes]
    return [(load_of(shape), model_time_s(model, shape)) for shape in shapes]


def model_time_s(model: StepTimeModel, shape: StepShape) -> float:
    """Return how long a step keeps the next one of its kind waiting: the slowest stage, and the CPU of a single one."""
    stage_s = max(model.stage_times_s(shape))
    return stage_s + model.cpu_s(shape) if model.num_stages == 1 else stage_s


def _typical_s(load: StepLoad) -> float:
    linear = max(256, load.num_tokens) / 256
    return _TYPICAL_STEP_S * (linear + load.num_decodes / 1000 + load.context_tokens / 5e5 + load.chunk_work / 1e7)


def _values(load: StepLoad) -> list[float]:
    num_tokens = load.num_tokens
    return [
        1.0,
        num_tokens,
        load.num_decodes,
        load.context_tokens,
        load.chunk_work,
        *[num_tokens - knot if num_tokens > knot else 0 for knot in _KNOTS],
    ]


def _sum_of(parts: Sequence[float], load: StepLoad) -> float:
    num_tokens, num_decodes, context_tokens, chunk_work = load
    total_s = (
        parts[0] + parts[1] * num_tokens + parts[2] * num_decodes + parts[3] * context_tokens + parts[4] * chunk_work
    )
    for part, knot in zip(parts[5:], _KNOTS, strict=True):
        if num_tokens <= knot:
            break
        total_s += part * (num_tokens - knot)
    return total_s


def _equations(load: StepLoad, time_s: float, unit_s: float) -> _Float64Array:
    """Return what a step adds to the normal equations of the errors, measured in `unit_s`."""
    relative = np.array(_values(load)) / unit_s
    return np.outer(relative, np.append(relative, time_s / unit_s))


def _solve(parts: list[float], equations: _Float64Array) -> None:
    """Move `parts`, in place, towards the least squares solution without negative ones."""
    rows = equations.tolist()
    for _ in range(_NUM_SWEEPS):
        for index, row in enumerate(rows):
            slope = row[-1] - sum(map(mul, row, parts))
            parts[index] = max(parts[index] + slope / row[index], 0.0)
