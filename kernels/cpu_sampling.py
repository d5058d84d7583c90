"""Choose a token for each row of logits in one C++ kernel, for CPUs; see `sampling`, which does the same on GPUs.

Dimensions: n rows; V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayserve_sarathi.kernels.native import load_library


def draw(
    logits: Tensor,
    *,
    temperature: npt.NDArray[np.float32],
    top_k: npt.NDArray[np.int32],
    top_p: npt.NDArray[np.float32],
    min_p: npt.NDArray[np.float32],
    u: npt.NDArray[np.float64],
) -> Tensor:
    """Return a token id for each row, [n] int32; see `sampling.draw`. The logits, [n, V] float32, stay as they are."""
    logits = logits.contiguous()
    columns = [
        np.ascontiguousarray(column, dtype=dtype)
        for column, dtype in (
            (temperature, np.float32),
            (top_k, np.int32),
            (top_p, np.float32),
            (min_p, np.float32),
            (u, np.float64),
        )
    ]
    token_ids = np.empty(len(logits), dtype=np.int32)
    pointers = (array.ctypes.data for array in (*columns, token_ids))
    load_library().sarathi_draw(logits.data_ptr(), *logits.shape, *pointers)
    return torch.from_numpy(token_ids)
