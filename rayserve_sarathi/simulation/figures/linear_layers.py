"""Arithmetic intensity of the linear layers, their time, and the knee between memory-bound and compute-bound.

Their time is that of reading the weights as long as tokens are few, and in proportion to the tokens once they are many
(paper, section 3.1). The knee is where the two lines meet; the intensity there is the machine's balance.
"""

from bisect import bisect_left
from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.figures.machine import Machine
from rayserve_sarathi.simulation.model_shape import RankShape
from rayserve_sarathi.step_shape import StepShape

NUM_TOKENS = tuple(
    sorted({*(2**power for power in range(13)), *range(32, 1025, 32), *range(128, 4097, 128), *range(129, 4097, 128)})
)
_PRODUCTS = ("qkv", "o", "up", "down")


@dataclass(frozen=True, slots=True, kw_only=True)
class LinearLayerSeries:
    """A point for each number of tokens.

    Args:
        num_tokens: In the step, ascending.
        flops_per_byte: Arithmetic intensity of the linear layers.
        time_s: Of the linear layers of all stages.
        balance: FLOP/s over bytes/s of the device, as much of both as programs reach.
        balance_tokens: Where the intensity reaches the balance; None if nowhere.
        knee_tokens: Where the time of few tokens meets the line of many.
    """

    num_tokens: tuple[int, ...]
    flops_per_byte: tuple[float, ...]
    time_s: tuple[float, ...]
    balance: float
    balance_tokens: float | None
    knee_tokens: float


def linear_layers(machine: Machine, model: CostModel, *, num_tokens: Sequence[int] = NUM_TOKENS) -> LinearLayerSeries:
    """Return the series; `num_tokens` ascend from few to so many that they are compute-bound.

    Raises:
        ConfigError: The machine cannot be.
    """
    device, rank = machine.device(), machine.rank()
    intensity = [_flops_per_byte(rank, tokens, device.itemsize) for tokens in num_tokens]
    times_s = [_time_s(model, tokens) for tokens in num_tokens]
    balance = (device.peak_flops * device.compute_efficiency) / (device.memory_bandwidth * device.memory_efficiency)
    return LinearLayerSeries(
        num_tokens=tuple(num_tokens),
        flops_per_byte=tuple(intensity),
        time_s=tuple(times_s),
        balance=balance,
        balance_tokens=_crossing(num_tokens, intensity, balance),
        knee_tokens=times_s[0] * num_tokens[-1] / times_s[-1],
    )


def _flops_per_byte(rank: RankShape, num_tokens: int, itemsize: int) -> float:
    """Weights are read once, those of experts that no token goes to never; hidden states are read and written."""
    num_elements = 0.0
    for operator in _PRODUCTS:
        num_in, num_out = rank.matrix(operator)
        num_matrices, num_per_token = rank.experts_of(operator)
        num_read = num_matrices * (1 - (1 - num_per_token / num_matrices) ** num_tokens)
        num_elements += num_read * num_in * num_out + num_tokens * num_per_token * (num_in + num_out)
    return num_tokens * rank.layer_flops / (num_elements * itemsize)


def _time_s(model: CostModel, num_tokens: int) -> float:
    shape = StepShape(num_decodes=0, decode_context_tokens=0, chunks=((num_tokens, 0),), num_samples=0)
    parts_s = model.parts_s(shape)
    return sum(parts_s[operator] for operator in _PRODUCTS)


def _crossing(num_tokens: Sequence[int], values: Sequence[float], limit: float) -> float | None:
    index = bisect_left(values, limit)
    if index == len(values):
        return None
    if index == 0:
        return float(num_tokens[0])
    (left, right), (low, high) = num_tokens[index - 1 : index + 1], values[index - 1 : index + 1]
    return left + (right - left) * (limit - low) / (high - low)
