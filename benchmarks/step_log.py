"""What the engine's notes of a step cost, and what a trace of the last 20,000 steps costs whoever asks for it.

python benchmarks/step_log.py [--json PATH]
"""

import argparse
import pickle
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent))
from report import write_report

from rayserve_sarathi.step import SAMPLING_DTYPE, StageTiming, StepInput, StepOutput
from rayserve_sarathi.step_log import MAX_RECORDS, StepLog
from rayserve_sarathi.tracing import render_chrome_trace

NUM_REQUESTS, NUM_STAGES, STEP_S = 256, 2, 0.02

_Result = TypeVar("_Result")


def make_steps(num_steps: int) -> list[tuple[StepInput, StepOutput]]:
    """Make steps of 256 requests that decode, and what came of them."""
    ones = np.ones(NUM_REQUESTS, dtype=np.int32)
    request_ids = tuple(f"request-{index}" for index in range(NUM_REQUESTS))
    sampling = np.zeros(NUM_REQUESTS, dtype=SAMPLING_DTYPE)
    steps = []
    for step_id in range(num_steps):
        begin_s = step_id * STEP_S
        step = StepInput(
            step_id=step_id,
            epoch=0,
            request_ids=request_ids,
            token_ids=ones,
            query_lens=ones,
            context_lens=ones,
            block_tables=ones,
            num_blocks=ones,
            sample_requests=ones,
            sampling=sampling,
        )
        times = [(begin_s + stage * STEP_S, begin_s + (stage + 1) * STEP_S) for stage in range(NUM_STAGES)]
        timings = tuple(
            StageTiming(stage=stage, receive_s=start_s, start_s=start_s, end_s=end_s)
            for stage, (start_s, end_s) in enumerate(times)
        )
        steps.append((step, StepOutput(step_id=step_id, epoch=0, token_ids=ones, timings=timings)))
    return steps


def timed(work: Callable[[], _Result]) -> tuple[_Result, float]:
    """Return what `work` returns, and the processor seconds it took."""
    begin = time.process_time()
    result = work()
    return result, time.process_time() - begin


def main() -> None:
    """Fill the log, then take a trace."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, help="write the figures to this file as well")
    arguments = parser.parse_args()
    steps, log = make_steps(2 * MAX_RECORDS), StepLog()

    def fill() -> None:
        for step, output in steps:
            log.note_submit(step, step.step_id * STEP_S)
            log.note_return(output, (step.step_id + NUM_STAGES) * STEP_S)

    _, fill_s = timed(fill)
    trace = log.trace(pipeline="a", now_s=0.0)
    message, pickle_s = timed(lambda: pickle.dumps(trace, protocol=5))
    rendered, render_s = timed(lambda: render_chrome_trace([trace]))
    write_report(
        {
            "step_us": fill_s / len(steps) * 1e6,
            "trace_steps": len(trace.records),
            "trace_pickle_ms": pickle_s * 1e3,
            "trace_message_mb": len(message) / 1e6,
            "trace_render_s": render_s,
            "trace_json_mb": len(rendered) / 1e6,
        },
        path=arguments.json,
    )


if __name__ == "__main__":
    main()
