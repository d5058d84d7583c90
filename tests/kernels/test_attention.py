"""Every attention backend equals dense attention in float64, and nothing leaks from blocks that are not a request's.

Triton's runs in its interpreter here (see conftest.py). Those of other packages are in test_flash_attention.py.
"""

import numpy as np
import pytest
import torch

from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout
from rayserve_sarathi.kernels.native import NativeBuildError
from rayserve_sarathi.registry import load
from tests.kernels.attention_cases import CASES, CPU, Case, run, write

BACKENDS = ("cpp", "triton", "torch")


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> AttentionBackend:
    try:
        made: AttentionBackend = load("attention backend", request.param, ATTENTION_BACKENDS)()
    except (NativeBuildError, ImportError) as error:
        pytest.skip(str(error))
    return made


def skip_if_refused(backend: AttentionBackend, case: Case, dtype: torch.dtype) -> None:
    reason = backend.refuse(block_size=case.block_size, head_size=case.head_size, dtype=dtype, device=CPU)
    if reason is not None:
        pytest.skip(reason)


# Too many tiles for Triton's interpreter, which does some hundred a second.
LONG = {"chunks-only", "windowed-chunk-in-pieces", "many-query-heads-for-one", "decodes-only"}


@pytest.mark.parametrize(
    ("backend", "name"),
    [(backend, name) for backend in BACKENDS for name in CASES if backend != "triton" or name not in LONG],
    indirect=["backend"],
)
def test_it_equals_dense_attention_whatever_unused_slots_hold(backend: AttentionBackend, name: str) -> None:
    case = CASES[name]
    skip_if_refused(backend, case, torch.float32)

    ours, expected = run(backend, case, torch.float32)

    assert (ours - expected).abs().max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_softmax_of_narrow_types_is_in_float32(backend: AttentionBackend, dtype: torch.dtype) -> None:
    skip_if_refused(backend, CASES["window-across-blocks"], dtype)

    ours, expected = run(backend, CASES["window-across-blocks"], dtype)

    assert ours.dtype == dtype
    assert (ours - expected).abs().max() < 4 * torch.finfo(dtype).eps


@pytest.mark.parametrize("position", [0, 15, 100, 199])
def test_who_sees_a_key_that_is_nan_is_nan(backend: AttentionBackend, position: int) -> None:
    num_tokens, block_size = 200, 16
    lens = np.array([num_tokens], dtype=np.int32)
    num_blocks = -(-lens // block_size)
    layout = StepLayout(
        query_lens=lens,
        context_lens=0 * lens,
        block_tables=np.arange(num_blocks[0], dtype=np.int32),
        num_blocks=num_blocks,
        block_size=block_size,
    )
    metadata = AttentionMetadata.of(layout, CPU)
    shape = backend.kv_cache_shape(num_blocks=int(num_blocks[0]), block_size=block_size, num_kv_heads=1, head_size=16)
    caches = torch.zeros(shape), torch.zeros(shape)
    q, k, v = torch.randn(3, num_tokens, 1, 16, generator=torch.Generator().manual_seed(0))
    k[position] = torch.nan

    rows = write(backend, (q, k, v), caches, metadata)
    out = backend.attention(rows, *caches, metadata=metadata, scale=0.25, sliding_window=None)

    assert out[:position].isfinite().all() and out[position:].isnan().all()
