"""The real engine on this machine beside its simulation: latencies, stalls and capacity of `sarathi` and `vllm`.

python benchmarks/real_engine.py [--quick] [--data DIR] [--json PATH]

A model of 100M parameters with random weights, in this process; requests of the paper's chat trace with all lengths
divided by 16, Poisson arrivals. The target is the paper's strict one, five times as long as a step of 32 decodes with
4,096 / 16 tokens of context each takes. First the model's steps are measured, as `sarathi profile` does; from these the
capacity of `sarathi` with `token_budget: auto` is predicted. Then the engine serves 60% of it under both policies, and
the same requests are simulated. Last, the capacity of both policies is searched for with the engine itself.
"""

import argparse
import json
import os
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
sys.path.insert(0, str(Path(__file__).resolve().parent))
from bubbles import MODEL
from inline_server import Served, Server
from paper import TRACE
from report import Figure, write_report

from rayserve_sarathi.config import EngineConfig, SchedulerConfig, SloConfig
from rayserve_sarathi.engine import believed_step_times
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import Grid
from rayserve_sarathi.profiling.profile import measure_profile
from rayserve_sarathi.profiling.stage_clock import StageClock
from rayserve_sarathi.simulation.capacity import Capacity, find_capacity
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.profile_files import write_profile
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.step_times import make_step_time_model, profile_name
from rayserve_sarathi.simulation.system import SimulatedSystem
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS, Workload, make_workload, read_trace
from rayserve_sarathi.step_shape import StepShape, StepTimeModel
from tests.measured_data import data_folder

DIVISOR = 16
MAX_MODEL_LEN = 8192 // DIVISOR
MAX_NUM_SEQS = 64
NUM_BLOCKS = 4096
BLOCK_SIZE = 16
LOAD = 0.6
STRICT = 5
NUM_DECODES = 32
TOLERANCE = 0.1
GRID = Grid(
    decodes=(1, 2, 4, 8, 12, 16, 24, 32, 48, 64),
    decode_contexts=(0, 64, 256, 511),
    chunks=(2, 8, 16, 32, 64, 96, 128, 192, 256, 320, 384, 448, 512),
    chunk_contexts=(0, 128, 384),
    repeats=3,
)
SCHEDULERS = {
    "sarathi": SchedulerConfig(
        policy="sarathi", token_budget="auto", max_num_batched_tokens=MAX_MODEL_LEN, max_num_seqs=MAX_NUM_SEQS
    ),
    "vllm": SchedulerConfig(policy="vllm", max_num_seqs=MAX_NUM_SEQS),
}


def draw_requests(data: Path | None, *, num_requests: int) -> Workload:
    """Return requests at a rate of one a second; `data` is the folder with `traces/`, None takes fitted lengths."""
    lengths = SHAREGPT_LENGTHS if data is None else read_trace(data / "traces" / TRACE)
    workload = make_workload(lengths, num_requests=num_requests, max_total_tokens=DIVISOR * (MAX_MODEL_LEN - 2))
    return workload.with_lengths_divided(DIVISOR)


def make_config(folder: Path) -> EngineConfig:
    """Return the engine's settings without a policy; the model's description goes into `folder`."""
    (folder / "config.json").write_text(json.dumps(MODEL))
    return EngineConfig(
        model=str(folder),
        load_format="dummy",
        device="cpu",
        max_model_len=MAX_MODEL_LEN,
        num_gpu_blocks_override=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        enable_prefix_caching=False,
    )


def measure_steps(config: EngineConfig, folder: Path) -> StepTimeModel:
    """Measure the model's steps on this machine, and return what predicts them."""
    clock = StageClock(config, num_blocks=NUM_BLOCKS)
    profile = measure_profile(clock, GRID, note=lambda text: None)
    write_profile(folder / profile_name("cpu", config.model, tensor_parallel_size=1), profile)
    return make_step_time_model(config.model, "cpu", source="profile", profiles=folder)


def strict_target_s(model: StepTimeModel) -> float:
    """Return the paper's strict target (section 5), with its lengths divided."""
    step = StepShape(
        num_decodes=NUM_DECODES,
        decode_context_tokens=NUM_DECODES * (4096 // DIVISOR),
        chunks=(),
        num_samples=NUM_DECODES,
    )
    return STRICT * (max(model.stage_times_s(step)) + model.cpu_s(step))


def compare(measured: Served, simulated: SimulationResult) -> dict[str, Figure]:
    """Return measured and simulated latencies, in seconds, and the simulated ones over the measured ones."""
    simulated_ttft = np.quantile(simulated.ttft_s, [0.5, 0.99])
    pairs = {
        "tbt_p50_s": (measured.gaps.quantile(0.5), simulated.gaps.quantile(0.5)),
        "tbt_p99_s": (measured.gaps.quantile(0.99), simulated.gaps.quantile(0.99)),
        "tbt_max_s": (measured.gaps.max, simulated.gaps.max),
        "ttft_p50_s": (measured.ttft.quantile(0.5), float(simulated_ttft[0])),
        "ttft_p99_s": (measured.ttft.quantile(0.99), float(simulated_ttft[1])),
    }
    return {
        name: {"measured": real, "simulated": virtual, "ratio": virtual / real}
        for name, (real, virtual) in pairs.items()
    }


def main() -> None:
    """Measure the steps, predict, serve, search, and write the figures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="do not search for the engine's capacity")
    parser.add_argument("--num-requests", type=int, default=100, metavar="N", help="of each run (default: %(default)s)")
    parser.add_argument("--data", type=Path, default=data_folder(), help="folder with traces/")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    workload = draw_requests(arguments.data, num_requests=arguments.num_requests)
    with tempfile.TemporaryDirectory() as name:
        config = make_config(Path(name))
        # See `Stage.load`.
        with ThreadPoolExecutor(1) as passing:
            step_times = passing.submit(measure_steps, config, Path(name)).result()
        criteria = Criteria(p99_tbt_s=strict_target_s(step_times))
        config = replace(config, slo=SloConfig(tbt_s=criteria.p99_tbt_s))
        figures: dict[str, Figure] = {"tbt_target_s": criteria.p99_tbt_s, "num_requests": len(workload)}
        systems = {
            policy: SimulatedSystem(
                step_times,
                num_blocks=NUM_BLOCKS,
                block_size=BLOCK_SIZE,
                max_model_len=MAX_MODEL_LEN,
                scheduler=scheduler,
                slo=config.slo,
                prior=believed_step_times(config, resolve_model(config)),
            )
            for policy, scheduler in SCHEDULERS.items()
        }
        predicted = {
            policy: find_capacity(system.at_rates(workload, criteria), criteria.are_met, tolerance=TOLERANCE / 4).rate
            for policy, system in systems.items()
        }
        figures["predicted_capacity"] = predicted
        sys.stdout.write(f"target {criteria.p99_tbt_s:.3f} s; predicted capacity {predicted}\n")
        at_load = workload.at_rate(LOAD * predicted["sarathi"])
        server = Server(config)
        for policy, scheduler in SCHEDULERS.items():
            figures[policy] = compare(server.serve(at_load, scheduler), systems[policy].run(at_load))
        if not arguments.quick:
            capacities = {
                policy: search(server, scheduler, workload, criteria, predicted[policy])
                for policy, scheduler in SCHEDULERS.items()
            }
            figures["capacity"] = capacities
            figures["capacity_over_vllm"] = capacities["sarathi"] / capacities["vllm"]
        server.close()
    write_report(figures, path=arguments.json)


def search(
    server: Server, scheduler: SchedulerConfig, workload: Workload, criteria: Criteria, first_rate: float
) -> float:
    """Return the engine's capacity in requests a second."""

    def run(rate: float) -> Served:
        served = server.serve(workload.at_rate(rate), scheduler, give_up_s=criteria.p99_tbt_s)
        sys.stdout.write(
            f"{rate:.2f}/s: P99 TBT {served.p99_tbt_s:.3f} s, delay {served.median_scheduling_delay_s:.2f} s\n"
        )
        sys.stdout.flush()
        return served

    found: Capacity[Served] = find_capacity(run, criteria.are_met, first_rate=first_rate, tolerance=TOLERANCE)
    return found.rate


if __name__ == "__main__":
    main()
