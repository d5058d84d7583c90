"""Time of schedule() + update() with 256 decoding and 10,000 waiting requests: what the engine costs per step.

python benchmarks/scheduler.py [--json PATH]
"""

import argparse
import gc
import statistics
import sys
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import write_report

from rayserve_sarathi.config import SchedulerConfig
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.scheduling.sarathi import SarathiScheduler
from rayserve_sarathi.step import StepOutput

NUM_RUNNING, NUM_WAITING, NUM_STEPS = 256, 10_000, 1000
CONTEXT, BLOCK_SIZE, VOCAB_SIZE = 1024, 16, 32_000


def make_scheduler() -> SarathiScheduler:
    """Make a scheduler with all requests added: the first 256 run, the others find no place."""
    rng = np.random.default_rng(0)
    blocks = BlockManager(NUM_RUNNING * 200, block_size=BLOCK_SIZE, watermark=0.01)
    config = SchedulerConfig(token_budget=512, max_num_seqs=NUM_RUNNING, max_num_waiting=NUM_RUNNING + NUM_WAITING)
    scheduler = SarathiScheduler(config, blocks, max_model_len=4096, vocab_size=VOCAB_SIZE)
    for index in range(NUM_RUNNING + NUM_WAITING):
        prompt = rng.integers(0, VOCAB_SIZE, CONTEXT).tolist()
        scheduler.add(Request(f"request-{index}", prompt, SamplingParams(max_tokens=3000), eos_token_ids=(2,)))
    return scheduler


def main() -> None:
    """Warm up until all 256 decode, then time each step."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    scheduler = make_scheduler()
    gc.collect()
    gc.freeze()  # as the engine does once it is ready
    times_ms, schedule_ms = [], []
    now_s = 0.0
    while len(times_ms) < NUM_STEPS:
        now_s += 0.02
        begin = time.perf_counter()
        step = scheduler.schedule(now_s)
        middle = time.perf_counter()
        assert step is not None
        token_ids = np.full(len(step.sample_requests), 7, dtype=np.int32)
        output = StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=token_ids)
        resume = time.perf_counter()
        scheduler.update(output, now_s)
        end = time.perf_counter()
        if len(step.request_ids) == step.num_tokens == NUM_RUNNING:
            times_ms.append((middle - begin + end - resume) * 1e3)
            schedule_ms.append((middle - begin) * 1e3)
    state = scheduler.state()
    assert (state.num_requests_running, state.num_requests_waiting) == (NUM_RUNNING, NUM_WAITING)
    write_report(
        {
            "num_running": NUM_RUNNING,
            "num_waiting": NUM_WAITING,
            "schedule_ms_p50": statistics.median(schedule_ms),
            "schedule_update_ms_p50": statistics.median(times_ms),
            "schedule_update_ms_p99": statistics.quantiles(times_ms, n=100)[98],
        },
        path=arguments.json,
    )


if __name__ == "__main__":
    main()
