"""Random numbers that depend on (seed, position) alone: a hash, not a generator with a state.

So a request gets the same tokens in any batch, after any preemption, and on a new stage.
"""

import numpy as np
import numpy.typing as npt

_UInt64Array = npt.NDArray[np.uint64]

_GOLDEN_RATIO = np.uint64(0x9E3779B97F4A7C15)


def uniforms(seeds: _UInt64Array, positions: npt.NDArray[np.integer]) -> npt.NDArray[np.float64]:
    """Return a number in [0, 1) for each pair.

    Args:
        seeds: [S].
        positions: Tokens before the one to be sampled, [S].
    """
    # The seed is hashed first: otherwise the sequence of one seed could be that of another, shifted.
    state = _mix(seeds + _GOLDEN_RATIO) + positions.astype(np.uint64) * _GOLDEN_RATIO
    # 52 bits: 1 minus the largest is then a whole unit in the last place, so that u * total < total after rounding.
    return (_mix(state) >> np.uint64(12)).astype(np.float64) * 2.0**-52


def _mix(x: _UInt64Array) -> _UInt64Array:
    """Scramble the bits (splitmix64's finaliser; Steele et al., 2014); overflow wraps around."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
