"""Each CPU kernel beside torch's operators and the limit of this machine.

python benchmarks/cpu_kernels.py [--json PATH]

The limit is the longer of two times: the bytes that must be read from memory over the bandwidth, and the operations
over the rate of a large matrix product, torch's or ours; both are measured at the beginning. Kernels take turns, and
the least of several times counts, as others on the machine only add to it. Weights and KV are larger than the caches.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from itertools import cycle
from pathlib import Path

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it

sys.path.insert(0, str(Path(__file__).resolve().parent))
from limits import AttentionWork, Limits
from report import Figure, write_report

from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.native import kernels_for
from rayserve_sarathi.registry import load

REPEATS = 30
CACHE_BYTES = 64 * 2**20
LINEAR_SIZES = ((3072, 768), (768, 2560), (2048, 256), (256, 1024))
LINEAR_ROWS = (1, 4, 16, 64, 256)
HEADS = ((12, 4, 64), (8, 2, 32))
STEPS = {
    "16 decodes @ 1024": ((1, 1024),) * 16,
    "32 decodes @ 256": ((1, 256),) * 32,
    "512 @ 512": ((512, 512),),
    "15 decodes @ 1024, 256 @ 256": (*(((1, 1024),) * 15), (256, 256)),
}
BLOCK_SIZE = 16


def least_s(runs: dict[str, Callable[[], object]]) -> dict[str, float]:
    """Return the least time of each, in turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(REPEATS):
        for name, run in runs.items():
            begin_s = time.perf_counter()
            run()
            times[name].append(time.perf_counter() - begin_s)
    return {name: min(several) for name, several in times.items()}


def measure_limits() -> Limits:
    """Measure the machine: a sum of what no cache holds, and a large product, by torch or by our kernel."""
    large = torch.randn(4 * CACHE_BYTES // 4)
    a, b = torch.randn(1024, 2048), torch.randn(2048, 2048)
    linear = Linear(b)
    times = least_s({"sum": large.sum, "product": lambda: a @ b, "ours": lambda: linear(a)})
    product_s = min(times["product"], times["ours"])
    return Limits(large.numel() * 4 / times["sum"], 2 * a.numel() * len(b) / product_s)


def measure_linear(num_rows: int, num_outputs: int, num_inputs: int, limits: Limits) -> dict[str, Figure]:
    """Measure a matrix product with weights that come from memory."""
    count = max(1, CACHE_BYTES // (4 * num_outputs * num_inputs))
    weights = [torch.randn(num_outputs, num_inputs) for _ in range(count)]
    linears, plain, x = cycle([Linear(weight) for weight in weights]), cycle(weights), torch.randn(num_rows, num_inputs)
    times = least_s({"kernel": lambda: next(linears)(x), "torch": lambda: F.linear(x, next(plain))})
    return _described(times, limits.time_s(weights[0].numel() * 4, 2 * num_rows * weights[0].numel()))


def measure_attention(
    lens: Sequence[tuple[int, int]], heads: tuple[int, int, int], limits: Limits
) -> dict[str, Figure]:
    """Measure attention of requests with (query_len, context_len); `heads` are N, K and H."""
    num_heads, num_kv_heads, head_size = heads
    work = AttentionWork(lens, heads, block_size=BLOCK_SIZE)
    metadata = work.metadata("cpu")
    q = torch.randn(work.num_tokens, num_heads, head_size)
    kv_bytes = 4 * work.num_kv_numbers

    def runs_of(backend: AttentionBackend) -> Callable[[], object]:
        shape = backend.kv_cache_shape(
            num_blocks=work.num_blocks, block_size=BLOCK_SIZE, num_kv_heads=num_kv_heads, head_size=head_size
        )
        pools = cycle([(torch.randn(shape), torch.randn(shape)) for _ in range(max(1, CACHE_BYTES // kv_bytes))])
        return lambda: backend.attention(q, *next(pools), metadata=metadata, scale=0.1, sliding_window=None)

    backends = {name: load("attention backend", name, ATTENTION_BACKENDS)() for name in ("cpp", "torch")}
    times = least_s({"kernel" if name == "cpp" else name: runs_of(backend) for name, backend in backends.items()})
    return _described(times, limits.time_s(kv_bytes, work.num_operations))


def _described(times: dict[str, float], limit_s: float) -> dict[str, Figure]:
    return {
        "kernel_us": 1e6 * times["kernel"],
        "torch_us": 1e6 * times["torch"],
        "limit_us": 1e6 * limit_s,
        "share_of_limit": limit_s / times["kernel"],
        "times_torch": times["torch"] / times["kernel"],
    }


def main() -> None:
    """Measure, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    if kernels_for(torch.empty(0)) is None:
        sys.exit("there is no build of the C++ kernels for this machine; install a C++ compiler")
    limits = measure_limits()
    linear = {
        f"{num_inputs} -> {num_outputs}, {num_rows} rows": measure_linear(num_rows, num_outputs, num_inputs, limits)
        for num_outputs, num_inputs in LINEAR_SIZES
        for num_rows in LINEAR_ROWS
    }
    attention = {
        f"{name}, {heads[0]}/{heads[1]} heads of {heads[2]}": measure_attention(lens, heads, limits)
        for name, lens in STEPS.items()
        for heads in HEADS
    }
    for name, figures in (linear | attention).items():
        values = "  ".join(f"{key} {value:8.2f}" for key, value in figures.items() if isinstance(value, float))
        sys.stdout.write(f"{name:<48} {values}\n")
    shares = [figures["share_of_limit"] for figures in (*linear.values(), *attention.values())]
    write_report(
        {
            "bandwidth_gb_per_s": limits.bandwidth / 1e9,
            "gflop_per_s": limits.operations / 1e9,
            "median_share_of_limit": statistics.median(share for share in shares if isinstance(share, float)),
            "linear": linear,
            "attention": attention,
        },
        path=arguments.json,
    )


if __name__ == "__main__":
    main()
