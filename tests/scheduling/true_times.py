"""Step times of an imagined device, and models of it that are wrong."""

from collections.abc import Sequence

import numpy as np

from rayserve_sarathi.scheduling.step_time import attention_work
from rayserve_sarathi.step_shape import StepShape


class ImaginedDevice:
    """A pipeline of equal stages: a knee at 200 tokens, tiles of 64 tokens, and noise.

    Args:
        num_stages: How many.
        noise: Standard deviation of the logarithm of a stage's time.
        slowness: All times are multiplied by it.
    """

    def __init__(self, *, num_stages: int = 1, noise: float = 0.0, slowness: float = 1.0) -> None:
        self._num_stages = num_stages
        self._noise = noise
        self._slowness = slowness
        self._rng = np.random.default_rng(0)

    def __call__(self, shape: StepShape) -> list[float]:
        """Return the time of each stage."""
        num_tokens = -(-shape.num_tokens // 64) * 64 if shape.num_tokens > 64 else shape.num_tokens
        work = sum(attention_work(*chunk) for chunk in shape.chunks)
        time_s = 4e-3 + max(12e-3, 6e-5 * num_tokens) + 3e-8 * shape.decode_context_tokens + 1.5e-9 * work
        noise = np.exp(self._rng.normal(0, self._noise, self._num_stages))
        return (self._slowness * time_s * noise).tolist()


class WrongModel:
    """What one might believe of that device: no tiles, other constants, and all of it wrong by a factor.

    Args:
        factor: Of all times.
    """

    num_stages = 1

    def __init__(self, factor: float) -> None:
        self._factor = factor

    def stage_times_s(self, shape: StepShape) -> Sequence[float]:
        """See `StepTimeModel`."""
        work = sum(attention_work(*chunk) for chunk in shape.chunks)
        time_s = max(14e-3, 5e-5 * shape.num_tokens) + 2.4e-8 * shape.decode_context_tokens + 1e-9 * work
        return [self._factor * time_s]

    def transfer_s(self, shape: StepShape) -> float:
        """See `StepTimeModel`."""
        return 0.0

    def cpu_s(self, shape: StepShape) -> float:
        """See `StepTimeModel`."""
        return self._factor * 1e-3
