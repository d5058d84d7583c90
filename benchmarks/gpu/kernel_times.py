"""Each kernel beside the limit: the longer of reading its operands and computing with them."""

from collections.abc import Callable, Sequence
from itertools import product

import torch
from limits import AttentionWork, Limits
from report import Figure
from timing import gpu_s

from rayserve_sarathi.kernels import fused
from rayserve_sarathi.kernels.attention.triton_paged import Tiling, TritonAttention, paged_attention

ROWS = (1, 8, 16, 32, 64, 96, 128, 160, 192, 224, 256, 257, 320, 384, 512, 513, 640, 768, 1024, 2048, 4096)
BLOCK_SIZE = 16
HEADS = {"mistral-7b": (32, 8, 128), "yi-34b": (56, 8, 128)}
MATRICES = {
    "mistral-7b": ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336)),
    "yi-34b": ((9216, 7168), (7168, 7168), (40960, 7168), (7168, 20480)),
}
STEPS = {
    "32 decodes @ 1024": ((1, 1024),) * 32,
    "128 decodes @ 1024": ((1, 1024),) * 128,
    "32 decodes @ 4096": ((1, 4096),) * 32,
    "1 decode @ 32768": ((1, 32768),),
    "512 @ 0": ((512, 0),),
    "512 @ 4096": ((512, 4096),),
    "512 @ 16384": ((512, 16384),),
    "31 decodes @ 1024, 480 @ 1024": (*(((1, 1024),) * 31), (480, 1024)),
}
_CACHE_BYTES = 128 * 2**20


def measure_linear(limits: Limits) -> dict[str, Figure]:
    """Return microseconds of a layer's four products for each number of rows, and the rows where they leave the limit.

    The knee is where operations take as long as reading the weights; below it more tokens are free.
    """
    figures: dict[str, Figure] = {}
    for model, shapes in MATRICES.items():
        num_weights = sum(outputs * inputs for outputs, inputs in shapes)
        copies = max(1, _CACHE_BYTES // (2 * num_weights))
        layers = [
            [torch.randn(shape, dtype=torch.bfloat16, device="cuda") for shape in shapes] for _ in range(copies + 1)
        ]
        by_rows: dict[str, Figure] = {}
        for rows in ROWS:
            inputs = {size: torch.randn(rows, size, dtype=torch.bfloat16, device="cuda") for _, size in shapes}
            runs = [
                lambda layer=layer, inputs=inputs: [
                    torch.nn.functional.linear(inputs[weight.shape[1]], weight) for weight in layer
                ]
                for layer in layers
            ]
            time_s = gpu_s(runs, repeats=10)
            limit_s = limits.time_s(2 * num_weights, 2 * rows * num_weights)
            by_rows[str(rows)] = {"us": 1e6 * time_s, "share_of_limit": limit_s / time_s}
        knee = limits.operations / limits.bandwidth
        figures[model] = {"knee_rows": knee, "rows": by_rows}
    return figures


def measure_attention(limits: Limits, *, is_sweeping: bool) -> dict[str, Figure]:
    """Return each step's microseconds of a layer's attention; of all tilings too if asked to."""
    figures: dict[str, Figure] = {}
    for (model, heads), (name, lens) in product(HEADS.items(), STEPS.items()):
        figures[f"{model}, {name}"] = _measure_step(heads, lens, limits, is_sweeping=is_sweeping)
    return figures


def _measure_step(
    heads: tuple[int, int, int], lens: Sequence[tuple[int, int]], limits: Limits, *, is_sweeping: bool
) -> dict[str, Figure]:
    num_heads, num_kv_heads, head_size = heads
    work = AttentionWork(lens, heads, block_size=BLOCK_SIZE)
    metadata = work.metadata("cuda")
    q = torch.randn(work.num_tokens, num_heads, head_size, dtype=torch.bfloat16, device="cuda")
    kv_bytes = 2 * work.num_kv_numbers
    shape = TritonAttention().kv_cache_shape(
        num_blocks=work.num_blocks, block_size=BLOCK_SIZE, num_kv_heads=num_kv_heads, head_size=head_size
    )
    pools = [
        tuple(torch.randn(shape, dtype=torch.bfloat16, device="cuda") for _ in range(2))
        for _ in range(1 + _CACHE_BYTES // kv_bytes)
    ]

    def time_s(tiling: Tiling | None) -> float:
        return gpu_s(
            [
                lambda pool=pool: paged_attention(
                    q,
                    *pool,
                    cu_query_lens=metadata.cu_query_lens,
                    seq_lens=metadata.seq_lens,
                    block_tables=metadata.block_tables,
                    has_chunks=metadata.has_chunks,
                    scale=head_size**-0.5,
                    sliding_window=None,
                    tiling=tiling,
                )
                for pool in pools
            ],
            repeats=10,
        )

    limit_s = limits.time_s(kv_bytes, work.num_operations)
    ours_s = time_s(None)
    figures: dict[str, Figure] = {"us": 1e6 * ours_s, "limit_us": 1e6 * limit_s, "share_of_limit": limit_s / ours_s}
    if len(lens) == 1 and lens[0][1] == 0:
        # What torch has for a single prompt without pages, FlashAttention-2 or cuDNN's: a good reference.
        k, v = (pool.view(1, -1, num_kv_heads, head_size).transpose(1, 2)[:, :, : len(q)] for pool in pools[0])
        reference_s = gpu_s(
            [
                lambda: torch.nn.functional.scaled_dot_product_attention(
                    q.transpose(0, 1)[None], k, v, is_causal=True, enable_gqa=True
                )
            ]
        )
        figures["torch_contiguous_us"] = 1e6 * reference_s
    if is_sweeping:
        chunks = product((64, 128), (32, 64, 128), (1,), ((4, 2), (4, 3), (8, 2), (8, 3)))
        decodes = product((16,), (32, 64, 128), (1, 2, 4, 8), ((2, 3), (4, 2), (4, 3), (4, 4)))
        tilings = [
            Tiling(rows=rows, keys=keys, num_splits=splits, num_warps=warps, num_stages=stages)
            for rows, keys, splits, (warps, stages) in (chunks if metadata.has_chunks else decodes)
        ]
        times = {}
        for tiling in tilings:
            try:
                times[tiling] = time_s(tiling)
            except Exception as error:  # whatever Triton raises for a tiling that the GPU has no room for
                if "out of resource" not in str(error):
                    raise
        best = sorted(times, key=lambda tiling: times[tiling])[:4]
        figures["best"] = [f"{1e6 * times[tiling]:.1f} us {tiling}" for tiling in best]
    return figures


def measure_fused(limits: Limits) -> dict[str, Figure]:
    """Return microseconds of the other kernels for sizes of Mistral-7B."""
    figures: dict[str, Figure] = {}
    for rows in (32, 512):
        for name, (run, num_elements) in _fused_runs(rows).items():
            figures[f"{name}, {rows} rows"] = {
                "us": 1e6 * gpu_s([run] * 10),
                "limit_us": 1e6 * limits.time_s(2 * num_elements, 0),
            }
    return figures


def _fused_runs(rows: int) -> dict[str, tuple[Callable[[], object], float]]:
    """Return each kernel, and how many numbers it reads and writes."""
    x, residual = (torch.randn(rows, 4096, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    weight = torch.ones(4096, dtype=torch.bfloat16, device="cuda")
    gate_up = torch.randn(rows, 28672, dtype=torch.bfloat16, device="cuda")
    qkv = torch.randn(rows, 48, 128, dtype=torch.bfloat16, device="cuda")
    cos, sin = (torch.randn(rows, 1, 64, device="cuda") for _ in range(2))
    caches = [torch.zeros(rows // 16 + 1, 16, 8, 128, dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    slots = torch.arange(rows, dtype=torch.int32, device="cuda")
    return {
        "add_rms_norm": (lambda: fused.rms_norm(x, residual, weight, eps=1e-5), 4 * x.numel()),
        "silu_mul": (lambda: fused.silu_mul(gate_up), 1.5 * gate_up.numel()),
        "rotate_and_write": (
            lambda: fused.rotate_and_write(qkv, *caches, cos=cos, sin=sin, slot_mapping=slots),
            2 * qkv.numel(),
        ),
    }
