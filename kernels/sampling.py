"""Choose a token for each row of logits in one Triton kernel, for GPUs, without a sort.

The thresholds of top_k and top_p are found by bisection: of numbers that are not negative, those with the larger bits
are larger, so that 30 halvings of the bits between 0 and 1 find them exactly, ties included.

Dimensions: n rows; V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
import triton
import triton.language as tl
from torch import Tensor

from rayserve_sarathi.kernels.gpu import on_device

_COLUMNS_AT_ONCE = 2048


def draw(logits: Tensor, settings: npt.NDArray[np.float64]) -> Tensor:
    """Return a token id for each row, [n] int32; what becomes of a row that is not finite means nothing.

    Args:
        logits: [n, V] float32, contiguous; changed in place.
        settings: [5, n], contiguous. The temperature; 0 takes the largest logit, the first of equals. `top_k`: keep so
            many of the most likely; 0 or V and more keep all. `top_p`: then keep the most likely with this share of
            what `top_k` leaves. `min_p`: and only those at least this share as likely as the most likely one. Last a
            random number in [0, 1): a token is drawn where the cumulated weight passes it times the total.
    """
    num_rows, vocab_size = logits.shape
    assert logits.is_contiguous() and logits.dtype == torch.float32, (logits.dtype, logits.stride())
    on_gpu = on_device(torch.from_numpy(settings), logits.device)
    out = torch.empty(num_rows, dtype=torch.int32, device=logits.device)
    columns = min(_COLUMNS_AT_ONCE, triton.next_power_of_2(vocab_size))
    _draw[(num_rows,)](logits, on_gpu, out, num_rows, vocab_size, COLUMNS=columns, num_warps=8)
    return out


@triton.jit
def _draw(logits_ptr, settings_ptr, out_ptr, num_rows, vocab_size, COLUMNS: tl.constexpr):
    """Draw from one row."""
    number = tl.program_id(0)
    row_ptr = logits_ptr + number.to(tl.int64) * vocab_size
    column = tl.arange(0, COLUMNS)
    temperature = tl.load(settings_ptr + number).to(tl.float32)
    top_k = tl.load(settings_ptr + num_rows + number).to(tl.int32)
    top_p = tl.load(settings_ptr + 2 * num_rows + number)
    min_p = tl.load(settings_ptr + 3 * num_rows + number).to(tl.float32)
    u = tl.load(settings_ptr + 4 * num_rows + number)

    largest = float("-inf")
    token = 0
    for first in range(0, vocab_size, COLUMNS):
        index = first + column
        x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
        here = tl.max(x, 0)
        where = tl.min(tl.where(x == here, index, vocab_size), 0)
        token = tl.where(here > largest, where, token)
        largest = tl.maximum(largest, here)

    if temperature > 0:
        total = tl.zeros([], tl.float64)
        for first in range(0, vocab_size, COLUMNS):
            index = first + column
            x = tl.load(row_ptr + index, mask=index < vocab_size, other=float("-inf"))
            # Subtracted before the division: a tiny temperature then gives minus infinity and not NaN.
            weight = tl.exp((x - largest) / temperature)
            tl.store(row_ptr + index, weight, mask=index < vocab_size)
            total += tl.sum(weight.to(tl.float64), 0)
        tl.debug_barrier()

        threshold = min_p  # the most likely token has weight 1
        if (top_k > 0) & (top_k < vocab_size):
            # The largest bits that so many weights reach.
            low = 0
            high = 0x3F800001
            for _ in range(30):
                middle = (low + high) // 2
                count = 0
                for first in range(0, vocab_size, COLUMNS):
                    index = first + column
                    weight = tl.load(row_ptr + index, mask=index < vocab_size, other=-1.0)
                    count += tl.sum((weight.to(tl.int32, bitcast=True) >= middle).to(tl.int32), 0)
                low = tl.where(count >= top_k, middle, low)
                high = tl.where(count >= top_k, high, middle)
            kth = low.to(tl.float32, bitcast=True)  # type: ignore[attr-defined]  # a tensor by now
            threshold = tl.maximum(threshold, kth)
            total = _mass(row_ptr, kth, vocab_size, COLUMNS)
        else:
            kth = 0.0
        if top_p < 1:
            wanted = top_p * total
            low = kth.to(tl.int32, bitcast=True)
            high = 0x3F800001
            for _ in range(30):
                middle = (low + high) // 2
                is_enough = _mass(row_ptr, middle.to(tl.float32, bitcast=True), vocab_size, COLUMNS) >= wanted
                low = tl.where(is_enough, middle, low)
                high = tl.where(is_enough, high, middle)
            threshold = tl.maximum(threshold, low.to(tl.float32, bitcast=True))

        target = u * _mass(row_ptr, threshold, vocab_size, COLUMNS)
        before = tl.zeros([], tl.float64)
        passed = 0
        before_block = before
        block = 0
        for first in range(0, vocab_size, COLUMNS):
            index = first + column
            weight = tl.load(row_ptr + index, mask=index < vocab_size, other=-1.0)
            kept = tl.where((weight >= threshold) & (index < vocab_size), weight, 0.0)
            after = before + tl.sum(kept.to(tl.float64), 0)
            is_here = (passed == 0) & (after > target)
            block = tl.where(is_here, first, block)
            before_block = tl.where(is_here, before, before_block)
            passed = tl.where(is_here, 1, passed)
            before = after
        index = block + column
        weight = tl.load(row_ptr + index, mask=index < vocab_size, other=-1.0)
        is_kept = (weight >= threshold) & (index < vocab_size) & (weight > 0)
        cumulated = before_block + tl.cumsum(tl.where(is_kept, weight, 0.0).to(tl.float64), 0)
        found = tl.min(tl.where(is_kept & (cumulated > target), index, vocab_size), 0)
        # The block's own cumulation may round to less than its part of the whole one.
        last = tl.max(tl.where(is_kept, index, 0), 0)
        token = tl.where(found < vocab_size, found, last)
    tl.store(out_ptr + number, token)


@triton.jit
def _mass(row_ptr, threshold, vocab_size, COLUMNS: tl.constexpr):
    """Return the sum of the weights that reach a threshold."""
    column = tl.arange(0, COLUMNS)
    mass = tl.zeros([], tl.float64)
    for first in range(0, vocab_size, COLUMNS):
        index = first + column
        weight = tl.load(row_ptr + index, mask=index < vocab_size, other=-1.0)
        mass += tl.sum(tl.where(weight >= threshold, tl.maximum(weight, 0.0), 0.0).to(tl.float64), 0)
    return mass
