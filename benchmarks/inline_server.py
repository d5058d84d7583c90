"""An engine in this process that serves a workload in real time, without HTTP and without Ray."""

import asyncio
import time
from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np
import torch

from rayserve_sarathi.config import EngineConfig, SchedulerConfig
from rayserve_sarathi.engine import Engine, RebuildLimit, make_scheduler
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.request import RequestOutput, SamplingParams
from rayserve_sarathi.simulation.criteria import most_long_gaps
from rayserve_sarathi.simulation.gaps import GapLog, Gaps
from rayserve_sarathi.simulation.workload import Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Served:
    """What the engine did with requests; a `criteria.RunResult`.

    Args:
        ttft: Times from arrival to the first token.
        delays: Times from arrival to the first step.
        gaps: Times between two tokens of a request.
        is_complete: Whether all requests were served; otherwise the target was missed for certain.
    """

    ttft: Gaps
    delays: Gaps
    gaps: Gaps
    is_complete: bool

    @property
    def median_scheduling_delay_s(self) -> float:
        """See `RunResult`; infinite if the run was ended."""
        return self.delays.quantile(0.5) if self.is_complete else float("inf")

    @property
    def p99_tbt_s(self) -> float:
        """See `RunResult`."""
        return self.gaps.quantile(0.99)


class Server:
    """The stages of a configuration, and an engine and a scheduler for each run.

    Args:
        config: Without prefix caching, as all runs share the KV cache.
    """

    def __init__(self, config: EngineConfig) -> None:
        assert not config.enable_prefix_caching, config
        self._config = config
        self._info = resolve_model(config)
        self._loop = asyncio.Runner()
        num_threads = torch.get_num_threads() if config.device == "cpu" else None
        self._pipeline, self.num_blocks = make_inline_pipeline(config, num_threads=num_threads)

    def close(self) -> None:
        """Let the stages go."""
        self._loop.run(self._pipeline.close())
        self._loop.close()

    def serve(self, workload: Workload, scheduler: SchedulerConfig, *, give_up_s: float | None = None) -> Served:
        """Serve a workload, each request at its time.

        Args:
            workload: What to serve.
            scheduler: Who decides each step.
            give_up_s: End as soon as more than one gap in a hundred is certain to exceed it; None to go on.
        """
        return self._loop.run(self._serve(workload, scheduler, give_up_s))

    async def _serve(self, workload: Workload, policy: SchedulerConfig, give_up_s: float | None) -> Served:
        delivered = asyncio.Event()
        num_open = len(workload)

        def deliver(outputs: Iterable[RequestOutput]) -> None:
            nonlocal num_open
            num_open -= sum(output.finish_reason is not None for output in outputs)
            delivered.set()

        config = replace(self._config, scheduler=policy)
        scheduler = make_scheduler(config, self._info, num_blocks=self.num_blocks)
        engine = Engine(scheduler, self._pipeline, deliver=deliver, rebuild_limit=RebuildLimit(0, window_s=1.0))
        await engine.warm_up(int(workload.num_prompt_tokens.max()))
        ttft, delays, gaps = GapLog(), GapLog(), GapLog(float("inf") if give_up_s is None else give_up_s)
        scheduler.metrics.time_to_first_token_s = ttft
        scheduler.metrics.request_queue_time_s = delays
        scheduler.metrics.inter_token_latency_s = gaps
        max_num_above = most_long_gaps(int(workload.num_output_tokens.sum()) - len(workload))
        running = asyncio.create_task(engine.run())
        sending = asyncio.create_task(self._send(engine, workload))
        try:
            while num_open and (give_up_s is None or gaps.num_above <= max_num_above):
                delivered.clear()
                await delivered.wait()
            sending.cancel()
            for index in range(len(workload)):
                engine.abort(str(index))
            # The next run begins with nothing in flight.
            while scheduler.has_unfinished_requests:  # noqa: ASYNC110  an aborted request is delivered nowhere
                await asyncio.sleep(0.01)
        finally:
            sending.cancel()
            running.cancel()
            await asyncio.gather(sending, running, return_exceptions=True)
        return Served(ttft=ttft.gaps(), delays=delays.gaps(), gaps=gaps.gaps(), is_complete=not num_open)

    async def _send(self, engine: Engine, workload: Workload) -> None:
        rng = np.random.default_rng(0)
        begin_s = time.monotonic() - workload.arrivals_s[0]
        each = zip(workload.arrivals_s, workload.num_prompt_tokens, workload.num_output_tokens, strict=True)
        for index, (arrival_s, num_prompt_tokens, num_output_tokens) in enumerate(each):
            await asyncio.sleep(begin_s + arrival_s - time.monotonic())
            prompt = rng.integers(0, self._info.vocab_size, num_prompt_tokens).tolist()
            engine.add(str(index), prompt, SamplingParams(max_tokens=int(num_output_tokens), ignore_eos=True))
