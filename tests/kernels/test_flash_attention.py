"""The backends of other packages ask for the right thing, with stand-ins that do what those packages document.

The packages run on GPUs alone. That they do what they document is not tested here.
"""

import itertools
import sys
from types import ModuleType
from typing import Any

import pytest
import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.registry import load
from tests.kernels.attention_cases import CASES, CPU, Case, dense, run

pytest.importorskip("triton", reason="there is no Triton, which stores their keys")

NAMES = ["mixed", "window-across-blocks", "one-chunk", "more-query-heads-than-a-tile-of-16"]
MODULES = {"flash_attn": "flash_attn", "vllm_flash_attn": "vllm_flash_attn", "flashinfer": "flashinfer"}


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    tables: list[list[int]],
    first_queries: Tensor,
    lens: Tensor,
    scale: float,
    left: int,
) -> Tensor:
    """Attend from each request's queries to its paged keys, with `left` tokens before itself, or all if it is -1."""
    outputs = []
    for request, table in enumerate(tables):
        num_keys = int(lens[request])
        keys, values = (pool[table].flatten(0, 1)[:num_keys] for pool in (k, v))
        queries = q[first_queries[request] : first_queries[request + 1]]
        window = None if left == -1 else left + 1
        outputs.append(dense(queries, keys, values, scale=scale, sliding_window=window))
    return torch.cat(outputs).to(q.dtype)


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    softmax_scale: float,
    causal: bool,
    window_size: tuple[int, int],
    block_table: Tensor,
    cu_seqlens_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Do what flash-attn 2.8 documents of its function of this name, and vLLM's fork with `seqused_k`."""
    assert causal and window_size[1] == 0
    assert (cu_seqlens_k is None) != (seqused_k is None)
    lens = seqused_k if seqused_k is not None else cu_seqlens_k.diff()
    assert int(lens.max()) == max_seqlen_k and int(cu_seqlens_q.diff().max()) == max_seqlen_q
    return attend(q, k, v, block_table.tolist(), cu_seqlens_q, lens, softmax_scale, window_size[0])


class BatchPrefillWithPagedKVCacheWrapper:
    """Do what flashinfer documents of its class of this name."""

    def __init__(self, workspace: Tensor, kv_layout: str) -> None:
        assert workspace.dtype == torch.uint8 and kv_layout == "NHD"

    def plan(
        self,
        qo_indptr: Tensor,
        paged_kv_indptr: Tensor,
        paged_kv_indices: Tensor,
        paged_kv_last_page_len: Tensor,
        num_qo_heads: int,
        num_kv_heads: int,
        head_dim_qk: int,
        page_size: int,
        **settings: Any,
    ) -> None:
        assert settings["causal"] and num_qo_heads % num_kv_heads == 0 and head_dim_qk > 0
        ends = paged_kv_indptr.tolist()
        self.tables = [paged_kv_indices[a:b].tolist() for a, b in itertools.pairwise(ends)]
        self.lens = (paged_kv_indptr.diff() - 1) * page_size + paged_kv_last_page_len
        self.first_queries, self.scale, self.left = qo_indptr, settings["sm_scale"], settings["window_left"]

    def run(self, q: Tensor, pools: tuple[Tensor, Tensor]) -> Tensor:
        return attend(q, *pools, self.tables, self.first_queries, self.lens, self.scale, self.left)


@pytest.fixture(params=MODULES)
def backend(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Any:
    stand_in = ModuleType(MODULES[request.param])
    stand_in.flash_attn_varlen_func = flash_attn_varlen_func
    stand_in.BatchPrefillWithPagedKVCacheWrapper = BatchPrefillWithPagedKVCacheWrapper
    monkeypatch.setitem(sys.modules, MODULES[request.param], stand_in)
    monkeypatch.delitem(sys.modules, "rayserve_sarathi.kernels.attention.flashinfer", raising=False)
    made = load("attention backend", request.param, ATTENTION_BACKENDS)()
    yield made
    # Imported with the stand-in in it.
    sys.modules.pop("rayserve_sarathi.kernels.attention.flashinfer", None)


@pytest.mark.parametrize("name", NAMES)
def test_it_equals_dense_attention(backend: Any, name: str) -> None:
    ours, expected = run(backend, CASES[name], torch.float32)

    assert (ours - expected).abs().max() < 1e-5


def test_a_cpu_is_refused(backend: Any) -> None:
    reason = backend.refuse(block_size=256, head_size=128, dtype=torch.bfloat16, device=CPU)

    assert reason == "it is for GPUs, not cpu"


def test_what_they_cannot_do_is_told(backend: Any) -> None:
    gpu = torch.device("cuda")

    assert backend.refuse(block_size=256, head_size=128, dtype=torch.bfloat16, device=gpu) is None
    assert "float32" in backend.refuse(block_size=256, head_size=128, dtype=torch.float32, device=gpu)
    assert "head size" in backend.refuse(block_size=256, head_size=300, dtype=torch.bfloat16, device=gpu)


@pytest.mark.parametrize("name", MODULES)
def test_without_its_package_it_says_so(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(sys.modules, "rayserve_sarathi.kernels.attention.flashinfer", raising=False)
    for module in ("flash_attn", "vllm", "vllm.vllm_flash_attn", "vllm_flash_attn", "flashinfer"):
        monkeypatch.setitem(sys.modules, module, None)  # as if it were not installed, where it is

    with pytest.raises(ImportError, match=MODULES[name]):
        load("attention backend", name, ATTENTION_BACKENDS)()


def test_vllms_own_copy_is_told_lengths_and_not_their_sums(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = ModuleType("vllm.vllm_flash_attn")
    inner.flash_attn_varlen_func = flash_attn_varlen_func
    monkeypatch.setitem(sys.modules, "vllm", ModuleType("vllm"))
    monkeypatch.setitem(sys.modules, "vllm.vllm_flash_attn", inner)
    made = load("attention backend", "vllm_flash_attn", ATTENTION_BACKENDS)()

    ours, expected = run(made, Case(lens=((1, 40), (5, 3))), torch.float32)

    assert (ours - expected).abs().max() < 1e-5
