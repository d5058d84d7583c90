"""The stages as actors, and Ray compiled graphs as the way between them."""

import asyncio
import logging
import os
import time
from collections.abc import Sequence
from typing import Any

import ray
from ray.dag import InputNode
from ray.exceptions import RayError
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayserve_sarathi.actors.stage import StageActor
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError, EngineDeadError
from rayserve_sarathi.step import StepInput, StepOutput

logger = logging.getLogger(__name__)

Stages = Sequence[Any]
"""Handles of `StageActor`, first to last."""

_HEALTH_TIMEOUT_S = 30.0
_HEARTBEAT_S = 1.0
"""While a step takes longer than this, the stages are asked for a sign of life as often."""
_CLOSE_TIMEOUT_S = 5.0
# Of Ray 2.60: the result of a graph that was closed meanwhile is an error that its own code then tries to iterate over.
_GRAPH_ERRORS = (RayError, TypeError)


def stage_bundle(device: str) -> dict[str, float]:
    """Return what a stage reserves.

    A GPU stage has a GPU to itself. A CPU stage reserves little, so that two stages and a scheduler find place on a
    laptop; how many threads it runs is set by `num_stage_threads`.
    """
    return {"GPU": 1.0, "CPU": 1.0} if device == "cuda" else {"CPU": 0.25}


def num_stage_threads(num_stages: int) -> int:
    """Return how many threads each of `num_stages` on one machine gets, so that together they use it once."""
    return max(len(os.sched_getaffinity(0)) // num_stages, 1)


async def start_stages(
    config: EngineConfig, *, placement_group: PlacementGroup, first_bundle: int
) -> tuple[Stages, int]:
    """Create the stage actors, each pinned to its bundle, and wait until all have weights and a KV cache.

    Args:
        config: The engine's, with a `device` that is not `auto`.
        placement_group: Where they run.
        first_bundle: Bundle of stage 0; the others follow.

    Returns:
        Their handles, first to last (an actor dies with its last handle), and the number of KV blocks of each.

    Raises:
        ConfigError: A stage found the configuration impossible.
        EngineDeadError: A stage did not come up.
    """
    num_stages = config.pipeline_parallel_size
    bundle = stage_bundle(config.device)
    # The compiled graph occupies the actor's default executor for good; calls beside it need a group of their own.
    actor_class: Any = ray.remote(concurrency_groups={"control": 1})(StageActor)  # type: ignore[call-overload]  # not in Ray's stub
    stages = [
        actor_class.options(
            num_cpus=bundle["CPU"],
            num_gpus=bundle.get("GPU", 0),
            scheduling_strategy=PlacementGroupSchedulingStrategy(
                placement_group, placement_group_bundle_index=first_bundle + stage
            ),
        ).remote(config, stage=stage, num_threads=num_stage_threads(num_stages))
        for stage in range(num_stages)
    ]
    try:
        num_blocks = min(await asyncio.gather(*(stage.load.remote() for stage in stages)))
        await asyncio.gather(*(stage.start.remote(num_blocks) for stage in stages))
    except RayError as error:
        if isinstance(cause := getattr(error, "cause", None), ConfigError):
            raise cause from None
        raise EngineDeadError(f"a stage did not come up: {error}") from error
    return stages, num_blocks


class CompiledGraphPipeline:
    """Steps go from stage to stage through a Ray compiled graph.

    Args:
        stages: Handles of `StageActor`, first to last; this object keeps them alive.
        config: The engine's; on `cuda` activations go by NCCL, on `cpu` through shared memory.
        max_steps_inside: Most steps that are submitted and not received.
        buffer_size_bytes: Size of a channel's buffer; a step's message should fit.
    """

    def __init__(
        self,
        stages: Stages,
        config: EngineConfig,
        *,
        max_steps_inside: int,
        buffer_size_bytes: int,
    ) -> None:
        self._stages = stages
        self._step_timeout_s = config.step_timeout_s
        self._inside: asyncio.Queue[Any] = asyncio.Queue()
        self._num_inside = 0
        with InputNode() as step:
            node = stages[0].execute_first.bind(step)
            for stage in stages[1:]:
                if config.device == "cuda":
                    node = node.with_tensor_transport(transport="nccl")
                node = stage.execute.bind(node)
        self._graph = node.experimental_compile(
            enable_asyncio=True,
            _submit_timeout=config.step_timeout_s,
            _buffer_size_bytes=buffer_size_bytes,
            _max_inflight_executions=max_steps_inside + 1,
        )

    async def submit(self, step: StepInput) -> None:
        """Write the step to the first stage's channel."""
        self._num_inside += 1
        try:
            self._inside.put_nowait(await self._graph.execute_async(step))
        except _GRAPH_ERRORS as error:
            raise EngineDeadError(await self._explain(error)) from error

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside."""
        waiting = asyncio.ensure_future(self._next_output())
        try:
            begin_s = time.monotonic()
            while not (await asyncio.wait((waiting,), timeout=_HEARTBEAT_S))[0]:
                # The graph does not always notice that an actor has died, and never that one is stopped.
                if not self._num_inside:
                    begin_s = time.monotonic()
                elif dead := await self._find_dead():
                    raise EngineDeadError(dead)
                elif time.monotonic() - begin_s > self._step_timeout_s:
                    raise EngineDeadError(f"a step took longer than step_timeout_s={self._step_timeout_s:.0f}")
            output = waiting.result()
        except _GRAPH_ERRORS as error:
            raise EngineDeadError(await self._explain(error)) from error
        finally:
            waiting.cancel()
        self._num_inside -= 1
        return output

    async def _next_output(self) -> StepOutput:
        output: StepOutput = await (await self._inside.get())
        return output

    async def check_health(self) -> None:
        """Ask every stage for a sign of life."""
        if dead := await self._find_dead():
            raise EngineDeadError(dead)

    async def close(self) -> None:
        """Take the graph down and end the stage actors."""
        try:
            await asyncio.wait_for(asyncio.to_thread(self._graph.teardown), _CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the compiled graph did not come down within %.0f s", _CLOSE_TIMEOUT_S)
        for stage in self._stages:
            ray.kill(stage)

    async def _explain(self, error: Exception) -> str:
        return f"{type(error).__name__}; {await self._find_dead() or 'all stages answer'}"

    async def _find_dead(self) -> str:
        pings = [stage.pid.options(concurrency_group="control").remote() for stage in self._stages]
        answers = await asyncio.gather(*map(_answer, pings))
        return "; ".join(f"stage {stage} {answer}" for stage, answer in enumerate(answers) if answer)


async def _answer(ping: Any) -> str:
    """Return what is wrong with a stage, or nothing."""
    try:
        await asyncio.wait_for(ping, _HEALTH_TIMEOUT_S)
    except TimeoutError:
        return f"does not answer within {_HEALTH_TIMEOUT_S:.0f} s"
    except RayError as error:
        return f"is dead ({type(error).__name__})"
    return ""
