"""What the kernels and the engine reach on a GPU: checks, linear layers, attention, whole steps, and capacity.

python benchmarks/gpu/run.py [--only SECTION ...] [--sweep] [--json PATH]

From a checkout, on any machine with a CUDA GPU, torch, Triton and transformers, and the small packages pydantic and
prometheus-client; without Ray. It takes less than ten minutes. A section that fails is reported, and the others go on.
"""

import argparse
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path

import torch
import triton

_HERE = Path(__file__).resolve().parent
sys.path += [str(_HERE.parent), str(_HERE.parent.parent)]

from checks import check_attention, check_fused, check_graphs, check_tokens  # noqa: E402  where they are is set above
from kernel_times import measure_attention, measure_fused, measure_linear  # noqa: E402
from models import MODELS, SMALL, measure_ahead, measure_capacity, measure_steps, model_config  # noqa: E402
from report import Figure, write_report  # noqa: E402
from timing import measure_limits, measure_sustained_operations  # noqa: E402

SECTIONS = ("checks", "linear", "attention", "fused", *(f"steps {name}" for name in MODELS), "ahead", "capacity")
# The paper's strict target: five times a step of 32 decodes with 4,096 tokens each (section 5).
STRICT, TARGET_STEP = 5, "32 decodes @ 4096"


def check() -> dict[str, Figure]:
    """Return how many checks there were, and those that failed."""
    failed: dict[str, Figure] = {}
    count = 0
    with model_config(SMALL) as config:
        for results in (check_attention(), check_fused(), check_graphs(config), check_tokens()):
            for name, error, tolerance in results:
                count += 1
                if not error <= tolerance:
                    failed[name] = [error, tolerance]
    return {"num_checks": count, "num_failed": len(failed), "failed": failed}


def main() -> None:
    """Run the sections, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS, help="sections to run")
    parser.add_argument("--sweep", action="store_true", help="time all tilings of attention, which takes minutes more")
    parser.add_argument("--hardware", default="h200", help="named hardware of the limits (default: %(default)s)")
    parser.add_argument("--num-requests", type=int, default=100, help="of each run of capacity (default: %(default)s)")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        sys.exit("torch sees no CUDA GPU here; install its CUDA build, or run benchmarks/cpu_kernels.py for the CPU")
    limits = measure_limits()
    figures: dict[str, Figure] = {
        "gpu": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "triton": triton.__version__,
        "bandwidth_gb_per_s": limits.bandwidth / 1e9,
        "tflop_per_s": limits.operations / 1e12,
        "tflop_per_s_sustained": measure_sustained_operations() / 1e12,
    }

    def capacity() -> dict[str, Figure]:
        steps = figures.get("steps mistral-7b")
        if not isinstance(steps, dict):  # not asked for, or failed
            steps = measure_steps("mistral-7b", limits, arguments.hardware, step_names={TARGET_STEP})
        step = steps[TARGET_STEP]["graphs_ms"]
        return measure_capacity(
            "mistral-7b", STRICT * step / 1e3, num_requests=arguments.num_requests, first_rate=8.0
        ) | {"tbt_target_ms": STRICT * step}

    run: dict[str, Callable[[], dict[str, Figure]]] = {
        "checks": check,
        "linear": lambda: measure_linear(limits),
        "attention": lambda: measure_attention(limits, is_sweeping=arguments.sweep),
        "fused": lambda: measure_fused(limits),
        **{f"steps {name}": lambda name=name: measure_steps(name, limits, arguments.hardware) for name in MODELS},
        "ahead": lambda: measure_ahead("mistral-7b"),
        "capacity": capacity,
    }
    has_failed = False
    for section in SECTIONS:
        if section not in arguments.only:
            continue
        begin_s = time.perf_counter()
        try:
            figures[section] = run[section]()
        except Exception:  # a figure of the others is worth having
            has_failed = True
            traceback.print_exc()
            figures[section] = f"failed: {traceback.format_exc().splitlines()[-1]}"
        torch.cuda.empty_cache()
        sys.stdout.write(f"{section}: {time.perf_counter() - begin_s:.0f} s\n")
        sys.stdout.flush()
        if arguments.json is not None:
            write_report(figures, path=arguments.json)
    write_report(figures, path=arguments.json)
    checks = figures.get("checks")
    sys.exit(1 if has_failed or (isinstance(checks, dict) and checks["num_failed"]) else 0)


if __name__ == "__main__":
    main()
