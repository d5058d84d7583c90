"""Choose a token for each row of logits in one C++ kernel, for CPUs; see `sampling`, which does the same on GPUs.

Dimensions: n rows; V vocabulary.
"""

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayserve_sarathi.kernels.native import load_library


def draw(logits: Tensor, settings: npt.NDArray[np.float64]) -> Tensor:
    """Return a token id for each row, [n] int32; see `sampling.draw`. The logits, [n, V] float32, stay as they are."""
    logits = logits.contiguous()
    token_ids = np.empty(len(logits), dtype=np.int32)
    load_library().sarathi_draw(logits.data_ptr(), *logits.shape, settings.ctypes.data, token_ids.ctypes.data)
    return torch.from_numpy(token_ids)
