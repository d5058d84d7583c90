"""A recorded run of the real engine, simulated with the times it took, has the same steps with the same requests."""

import asyncio

import numpy as np
import pytest

from rayserve_sarathi.config import SchedulerConfig
from rayserve_sarathi.engine import Engine, RebuildLimit
from rayserve_sarathi.request import RequestOutput, SamplingParams
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.simulation.simulator import make_simulated_scheduler, simulate
from rayserve_sarathi.simulation.virtual_pipeline import RecordedPipeline
from rayserve_sarathi.simulation.workload import Workload
from rayserve_sarathi.step import StageTiming, StepInput, StepOutput
from tests.factories import HashModel, make_scheduler

BLOCK_SIZE, NUM_BLOCKS, MAX_MODEL_LEN = 4, 40, 120
NUM_REQUESTS = 40


class VirtualLoop(asyncio.SelectorEventLoop):
    """An event loop whose time passes only, and at once, when all tasks wait for it."""

    def __init__(self) -> None:
        super().__init__()
        self._virtual_s = 0.0
        select = self._selector.select

        def skip(timeout: float | None) -> object:
            assert timeout is not None, "all wait, and nothing will happen"
            self._virtual_s += max(timeout, 0.0)
            return select(0)

        self._selector.select = skip

    def time(self) -> float:
        return self._virtual_s


class SleepingPipeline:
    """Stages that compute with `HashModel`, and take a few milliseconds for it, different ones each time."""

    def __init__(self, num_stages: int, seed: int) -> None:
        self.steps: list[StepInput] = []
        self._model = HashModel(num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE)
        self._rng = np.random.default_rng(seed)
        self._free_s = [0.0] * num_stages
        self._done: asyncio.Queue[StepOutput] = asyncio.Queue()

    async def submit(self, step: StepInput) -> None:
        loop = asyncio.get_running_loop()
        self.steps.append(step)
        end_s = loop.time()
        timings = []
        for stage, free_s in enumerate(self._free_s):
            receive_s = end_s
            start_s = max(receive_s, free_s)
            self._free_s[stage] = end_s = start_s + float(self._rng.uniform(0.0005, 0.004))
            timings.append(StageTiming(stage=stage, receive_s=receive_s, start_s=start_s, end_s=end_s))
        output = self._model.run(step)
        output = StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=output.token_ids, timings=tuple(timings))
        loop.call_at(end_s, self._done.put_nowait, output)

    async def receive(self) -> StepOutput:
        return await self._done.get()

    async def rebuild(self, broken: object) -> None:
        raise AssertionError("nothing fails here")

    async def check_health(self) -> None:
        pass

    async def close(self) -> None:
        pass


async def record(policy: str, num_stages: int, limits: dict[str, int]):
    """Run requests on an engine; return the workload, the steps, and the log of their times."""
    rng = np.random.default_rng(5)
    scheduler = make_scheduler(
        policy,
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        max_steps_in_flight=1 if num_stages == 1 else num_stages + 1,
        num_decode_groups=num_stages,
        enable_prefix_caching=False,
        **limits,
    )
    pipeline = SleepingPipeline(num_stages, seed=6)
    num_left, is_done = NUM_REQUESTS, asyncio.Event()

    def deliver(outputs: list[RequestOutput]) -> None:
        nonlocal num_left
        num_left -= sum(output.finish_reason is not None for output in outputs)
        if not num_left:
            is_done.set()

    loop = asyncio.get_running_loop()
    engine = Engine(scheduler, pipeline, deliver=deliver, rebuild_limit=RebuildLimit(0, window_s=1.0), clock=loop.time)
    running = asyncio.create_task(engine.run())
    arrivals_s, prompts, outputs = [], [], []
    for index in range(NUM_REQUESTS):
        if rng.random() < 0.6:
            await asyncio.sleep(float(rng.exponential(0.01)))
        prompts.append(int(rng.integers(1, 60)))
        outputs.append(int(rng.integers(1, 40)))
        arrivals_s.append(loop.time())
        sampling = SamplingParams(max_tokens=outputs[-1], ignore_eos=True)
        engine.add(str(index), rng.integers(0, 1000, prompts[-1]).tolist(), sampling)
    await is_done.wait()
    await asyncio.sleep(0.001)  # the last step is noted after its outputs are delivered
    records = engine.trace(pipeline="0").records
    running.cancel()
    await asyncio.gather(running, return_exceptions=True)
    workload = Workload(
        arrivals_s=np.array(arrivals_s),
        num_prompt_tokens=np.array(prompts),
        num_output_tokens=np.array(outputs),
        rate=1.0,
    )
    return workload, pipeline.steps, records


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize("policy", sorted(SCHEDULERS))
def test_a_recorded_run_has_the_same_steps(policy: str, num_stages: int):
    limits = {"token_budget": 24, "max_num_seqs": 8}
    loop = VirtualLoop()
    try:
        workload, steps, records = loop.run_until_complete(record(policy, num_stages, limits))
    finally:
        loop.close()
    assert len(records) == len(steps)

    passages = [(record.stages, record.back_s) for record in records]
    steps_simulated: list[dict[str, int]] = []
    scheduler = make_simulated_scheduler(
        SchedulerConfig(policy=policy, **limits),
        num_blocks=NUM_BLOCKS,
        block_size=BLOCK_SIZE,
        max_model_len=MAX_MODEL_LEN,
        num_stages=num_stages,
    )
    result = simulate(
        workload,
        scheduler,
        RecordedPipeline(num_stages, passages),
        note_step=lambda plan, *_: steps_simulated.append(plan.num_scheduled_tokens),
    )

    assert steps_simulated == [step.num_scheduled_tokens for step in steps]
    assert result.ends_s.max() == records[-1].back_s
    assert result.num_preemptions.sum() > 0 or policy in ("orca", "faster_transformer")
