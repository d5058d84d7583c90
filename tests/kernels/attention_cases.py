"""Steps to attend in, and dense attention in float64 to compare with, on any device."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout
from rayserve_sarathi.kernels.attention.token_major import TokenMajorCache


@dataclass(frozen=True, kw_only=True)
class Case:
    """A step: (query_len, context_len) of each request, decodes first."""

    lens: tuple[tuple[int, int], ...]
    block_size: int = 16
    num_heads: int = 4
    num_kv_heads: int = 2
    head_size: int = 16
    sliding_window: int | None = None


CPU = torch.device("cpu")
MIXED = ((1, 40), (1, 0), (1, 15), (1, 16), (1, 300), (2, 0), (33, 0), (5, 100), (16, 16))
CASES = {
    "mixed": Case(lens=MIXED),
    "block-size-1": Case(lens=MIXED, block_size=1),
    "window-shorter-than-a-block": Case(lens=MIXED, sliding_window=3),
    "window-of-one-token": Case(lens=MIXED, sliding_window=1, block_size=4),
    "window-across-blocks": Case(lens=MIXED, sliding_window=37),
    "window-longer-than-all": Case(lens=MIXED, sliding_window=1000),
    "multi-query": Case(lens=MIXED, num_heads=6, num_kv_heads=1),
    "multi-head": Case(lens=MIXED, num_heads=3, num_kv_heads=3),
    "blocks-of-64": Case(lens=MIXED, block_size=64, sliding_window=37),
    "head-size-40": Case(lens=MIXED, head_size=40),
    "head-size-48": Case(lens=MIXED, head_size=48),
    "head-size-128": Case(lens=MIXED, head_size=128, num_heads=8),
    "many-query-heads-for-one": Case(lens=MIXED, num_heads=71, num_kv_heads=1, head_size=64),
    "more-query-heads-than-a-tile-of-16": Case(lens=((1, 20), (3, 5)), num_heads=19, num_kv_heads=1),
    "one-long-decode": Case(lens=((1, 700),)),
    "one-long-decode-with-a-window": Case(lens=((1, 700),), sliding_window=300),
    "long-and-short-decodes": Case(lens=((1, 700), (1, 0), (1, 3)), num_kv_heads=1),
    "one-chunk": Case(lens=((40, 100),)),
    "decodes-only": Case(lens=tuple((1, context) for context in range(0, 400, 9))),
    "chunks-only": Case(lens=((700, 0), (600, 50))),
    "windowed-chunk-in-pieces": Case(lens=((1100, 3),), sliding_window=60),
}


def dense(q: Tensor, k: Tensor, v: Tensor, *, scale: float, sliding_window: int | None) -> Tensor:
    """Attend from the last len(q) tokens, [n, N, H], to all, [L, K, H], in float64."""
    group = q.shape[1] // k.shape[1]
    q, k, v = q.double(), k.double().repeat_interleave(group, 1), v.double().repeat_interleave(group, 1)
    key = torch.arange(len(k), device=k.device)
    query = key[len(k) - len(q) :, None]
    is_visible = key <= query
    if sliding_window is not None:
        is_visible &= key > query - sliding_window
    scores = torch.einsum("qnh,knh->nqk", q, k) * scale
    return torch.einsum("nqk,knh->qnh", scores.masked_fill(~is_visible, -torch.inf).softmax(-1), v)


def write(
    backend: AttentionBackend, qkv: Sequence[Tensor], caches: tuple[Tensor, Tensor], metadata: AttentionMetadata
) -> Tensor:
    """Store keys and values as a layer does, but without turning anything; return the queries."""
    half = (len(qkv[0]), 1, qkv[0].shape[2] // 2)
    return backend.rotate_and_write(
        torch.cat(tuple(qkv), dim=1),
        *caches,
        cos=torch.ones(half, device=qkv[0].device),
        sin=torch.zeros(half, device=qkv[0].device),
        metadata=metadata,
    )


def run(backend: AttentionBackend, case: Case, dtype: torch.dtype, device: torch.device = CPU) -> tuple[Tensor, Tensor]:
    """Return the backend's output and the dense one; every slot that no request wrote holds NaN beforehand."""
    generator = torch.Generator().manual_seed(0)
    query_lens, context_lens = (np.array(lens, dtype=np.int32) for lens in zip(*case.lens, strict=True))
    seq_lens = query_lens + context_lens
    num_blocks = -(-seq_lens // case.block_size)
    pool_size = int(num_blocks.sum()) + 7
    ids = torch.randperm(pool_size, generator=generator).numpy()
    tables = np.split(ids[: num_blocks.sum()], np.cumsum(num_blocks)[:-1])
    shape = backend.kv_cache_shape(
        num_blocks=pool_size, block_size=case.block_size, num_kv_heads=case.num_kv_heads, head_size=case.head_size
    )
    k_cache, v_cache = (torch.full(shape, torch.nan, dtype=dtype, device=device) for _ in range(2))

    def random(num_tokens: int, num_heads: int) -> Tensor:
        return torch.randn(num_tokens, num_heads, case.head_size, generator=generator).to(device, dtype)

    def metadata_of(new: np.ndarray, before: np.ndarray, chosen: np.ndarray) -> AttentionMetadata:
        layout = StepLayout(
            query_lens=new,
            context_lens=before,
            block_tables=np.concatenate([tables[request] for request in chosen]).astype(np.int32),
            num_blocks=num_blocks[chosen].astype(np.int32),
            block_size=case.block_size,
        )
        return AttentionMetadata.of(layout, device)

    keys, values = ([random(int(length), case.num_kv_heads) for length in seq_lens] for _ in range(2))
    queries = [random(int(length), case.num_heads) for length in query_lens]
    earlier = np.flatnonzero(context_lens)
    if len(earlier):
        k, v = (torch.cat([each[request][: context_lens[request]] for request in earlier]) for each in (keys, values))
        before = metadata_of(context_lens[earlier], np.zeros_like(earlier), earlier)
        if isinstance(backend, TokenMajorCache) and device == CPU:
            # All at once: in Triton's interpreter the kernel, which stores the step's own below, takes most of a test.
            slots = before.slot_mapping.long()
            k_cache.flatten(0, 1)[slots], v_cache.flatten(0, 1)[slots] = k, v
        else:
            write(backend, (random(len(k), case.num_heads), k, v), (k_cache, v_cache), before)
    metadata = metadata_of(query_lens, context_lens, np.arange(len(query_lens)))
    new = [slice(context, None) for context in context_lens]
    q = write(
        backend,
        (
            torch.cat(queries),
            torch.cat([key[part] for key, part in zip(keys, new, strict=True)]),
            torch.cat([value[part] for value, part in zip(values, new, strict=True)]),
        ),
        (k_cache, v_cache),
        metadata,
    )
    settings = {"scale": 0.3, "sliding_window": case.sliding_window}
    out = backend.attention(q, k_cache, v_cache, metadata=metadata, **settings)
    return out, torch.cat([dense(*qkv, **settings) for qkv in zip(queries, keys, values, strict=True)])
