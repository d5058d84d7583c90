"""This engine in a process of its own, without HTTP and Ray, as OpenVINO GenAI is driven."""

import asyncio
import itertools
import multiprocessing
import time
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import ProcessPoolExecutor

from drive import drive
from engines import our_settings
from model import NUM_COMPARED, Model
from report import Figure
from workloads import Interference, Workload

from rayserve_sarathi.bench.outcome import Outcome
from rayserve_sarathi.config import EngineConfig, parse
from rayserve_sarathi.engine import make_scheduler
from rayserve_sarathi.errors import SarathiError
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.local_engine import LocalEngine
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.request import RequestOutput, SamplingParams

Body = tuple[Sequence[int], int]


class LocalClient:
    """See `drive.Client`; tokens stay numbers, as those of OpenVINO do.

    Args:
        engine: Which runs.
    """

    def __init__(self, engine: LocalEngine) -> None:
        self._engine = engine
        self._ids = itertools.count()

    def encode(self, prompt_token_ids: Sequence[int], *, num_tokens: int) -> Body:
        """See `Client`."""
        return prompt_token_ids, num_tokens

    async def complete(self, body: Body, *, num_prompt_tokens: int, num_tokens: int, due_s: float) -> Outcome:
        """See `Client`."""
        sent_s = time.perf_counter()
        times_s: list[float] = []
        async for output in self._outputs(body):
            if output.error:
                raise RuntimeError(f"a request failed: {output.error}")
            times_s += [time.perf_counter()] * len(output.token_ids)
        return Outcome(
            num_prompt_tokens=num_prompt_tokens,
            num_tokens_asked=num_tokens,
            num_output_tokens=len(times_s),
            due_s=due_s,
            sent_s=sent_s,
            end_s=time.perf_counter(),
            token_times_s=times_s,
        )

    async def generate(self, prompt_token_ids: Sequence[int], num_tokens: int) -> list[int]:
        """Return the tokens after a prompt."""
        outputs = [output async for output in self._outputs((prompt_token_ids, num_tokens))]
        return [token_id for output in outputs for token_id in output.token_ids]

    def _outputs(self, body: Body) -> AsyncIterator[RequestOutput]:
        prompt, num_tokens = body
        sampling = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        return self._engine.generate(str(next(self._ids)), prompt, sampling)


def measure_ours(model: Model, workloads: Sequence[Workload], interference: Interference | None) -> dict[str, Figure]:
    """Return the figures of this engine's workloads, each way of starting it in a process that ends with it.

    Raises:
        RuntimeError: It cannot serve them.
    """
    ways: list[tuple[Sequence[Workload], Interference | None]] = [(workloads, None)]
    if interference is not None:
        ways.append(((), interference))
    figures: dict[str, Figure] = {}
    for way in ways:
        with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as process:
            try:
                figures |= process.submit(_measure, model.name, *way).result()
            except SarathiError as error:
                raise RuntimeError(str(error)) from error
    return figures


def _measure(name: str, workloads: Sequence[Workload], interference: Interference | None) -> dict[str, Figure]:
    model = Model(name)
    config = parse(EngineConfig, our_settings(name, is_interfered=interference is not None))
    info = resolve_model(config)
    pipeline, num_blocks = make_inline_pipeline(config)
    scheduler = make_scheduler(config, info, num_blocks=num_blocks)
    with asyncio.Runner() as runner:
        local = LocalEngine(scheduler, pipeline, eos_token_ids=info.eos_token_ids, model_name=name)
        client = LocalClient(runner.run(local.__aenter__()))
        figures = runner.run(drive(client, model, workloads, interference))
        if interference is None:
            figures["same_tokens"] = model.compare(
                lambda prompt: model.text(runner.run(client.generate(prompt, NUM_COMPARED)))
            )
        runner.run(local.__aexit__())
    return figures
