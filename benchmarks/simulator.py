"""How many requests a second the simulator gets through: Mistral-7B on an A100, chat lengths, just below capacity.

python benchmarks/simulator.py [--num-requests N] [--json PATH]
"""

import argparse
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import write_report

from rayserve_sarathi.config import SchedulerConfig
from rayserve_sarathi.simulation.capacity import find_capacity
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.system import make_system
from rayserve_sarathi.simulation.system_config import SystemConfig
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS, make_workload

CRITERIA = Criteria(p99_tbt_s=0.1)
MAX_MODEL_LEN = 8192


def main() -> None:
    """Find the capacity, and time a long run at 97% of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num-requests", type=int, default=10_000, metavar="N")
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    scheduler = SchedulerConfig(token_budget=512, max_num_seqs=128)
    system = make_system(
        SystemConfig(model="mistral-7b", hardware="a100", max_model_len=MAX_MODEL_LEN, scheduler=scheduler)
    )
    short = make_workload(SHAREGPT_LENGTHS, num_requests=2048, max_total_tokens=MAX_MODEL_LEN)
    capacity = find_capacity(system.at_rates(short, CRITERIA), CRITERIA.are_met, first_rate=3.0).rate
    workload = make_workload(
        SHAREGPT_LENGTHS, num_requests=arguments.num_requests, rate=0.97 * capacity, max_total_tokens=MAX_MODEL_LEN
    )
    wall_s, cpu_s = time.perf_counter(), time.process_time()
    result = system.run(workload)
    wall_s, cpu_s = time.perf_counter() - wall_s, time.process_time() - cpu_s
    write_report(
        {
            "capacity_requests_per_s": capacity,
            "num_requests": result.num_requests,
            "steps_per_request": result.num_steps / result.num_requests,
            "tokens_per_step": result.num_batched_tokens / result.num_steps,
            "simulated_requests_per_s": result.num_requests / wall_s,
            "simulated_requests_per_cpu_s": result.num_requests / cpu_s,
            "times_faster_than_real": result.duration_s / wall_s,
        },
        path=arguments.json,
    )


if __name__ == "__main__":
    main()
