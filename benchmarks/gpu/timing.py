"""Times on a GPU, and what it reaches at best."""

import statistics
import time
from collections.abc import Callable, Sequence

import torch
from limits import Limits

_MIB = 2**20


def measure_limits() -> Limits:
    """Measure a large addition, whose bytes are read and written, and a large matrix product of random numbers."""
    large = torch.randn(1024 * _MIB // 2, dtype=torch.bfloat16, device="cuda")
    double = torch.empty_like(large)
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    double_s = gpu_s([lambda: torch.add(large, large, out=double)])
    product_s = gpu_s([lambda: a @ b])
    return Limits(4 * large.numel() / double_s, 2 * len(a) ** 3 / product_s)


def measure_sustained_operations() -> float:
    """Return the operations a second after a second of them, when the GPU has lowered its clocks to save power."""
    a, b = (torch.randn(8192, 8192, dtype=torch.bfloat16, device="cuda") for _ in range(2))
    gpu_s([lambda: a @ b], repeats=1000)
    return 2 * len(a) ** 3 / gpu_s([lambda: a @ b], repeats=100)


def gpu_s(runs: Sequence[Callable[[], object]], *, repeats: int = 20) -> float:
    """Return the median time of one of `runs`, recorded as a CUDA graph one after the other.

    So no time to begin a kernel counts, and with operands of their own none finds them in the cache.
    """
    for run in runs:
        run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for run in runs:
            run()
    graph.replay()
    times = []
    for _ in range(repeats):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3 / len(runs))
    return statistics.median(times)


def wall_s(run: Callable[[], object], *, repeats: int = 15) -> float:
    """Return the median time from the call until the device has done what it asked for."""
    for _ in range(3):
        run()
    times = []
    for _ in range(repeats):
        torch.cuda.synchronize()
        begin_s = time.perf_counter()
        run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin_s)
    return statistics.median(times)
