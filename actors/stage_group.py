"""The stage actors of a pipeline: started together, asked for signs of life, replaced one stage at a time."""

import asyncio
import logging
import os
from collections.abc import Collection
from typing import Any

import ray
from ray.exceptions import RayError
from ray.util import placement_group_table
from ray.util.placement_group import PlacementGroup
from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

from rayserve_sarathi.actors.stage import StageActor
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError, EngineDeadError, PipelineFaultError, SarathiError
from rayserve_sarathi.placement import stage_bundle

logger = logging.getLogger(__name__)


def num_rank_threads(num_ranks: int) -> int:
    """Return how many threads each of `num_ranks` on one machine gets, so that together they use it once."""
    return max(len(os.sched_getaffinity(0)) // num_ranks, 1)


def reason_of(error: BaseException) -> str:
    """Return what clients may read of an error that came through Ray, which holds a traceback of another process."""
    cause = getattr(error, "cause", None) or error
    return str(cause) if isinstance(cause, SarathiError) else type(cause).__name__


class StageGroup:
    """Stages of `StageActor`s, a rank each, pinned to their bundles. It keeps them alive.

    Args:
        config: The engine's, after `placement.resolve_auto`.
        placement_group: Where they run.
        first_bundle: Bundle of stage 0; the others follow.
    """

    def __init__(self, config: EngineConfig, *, placement_group: PlacementGroup, first_bundle: int) -> None:
        self._config = config
        self._placement_group = placement_group
        self._first_bundle = first_bundle
        self._num_blocks = 0
        self.ranks: list[list[Any]] = [[] for _ in range(config.pipeline_parallel_size)]
        """Handles: of each stage, of each of its tensor-parallel ranks."""

    async def start(self) -> int:
        """Create all actors and wait until they have weights and KV caches.

        Returns:
            The number of KV blocks of each.

        Raises:
            ConfigError: A stage found the configuration impossible.
            EngineDeadError: A stage did not come up.
        """
        stages = range(len(self.ranks))
        self._num_blocks = min(await self._load(stages))
        await self._allocate(stages)
        return self._num_blocks

    async def replace(self, stages: Collection[int]) -> None:
        """End the actors of some stages, whatever they do, and start new ones in their place.

        Raises:
            PipelineFaultError: One did not come up.
        """
        self.end(stages)
        try:
            await self._load(stages)
            await self._allocate(stages)
        except (EngineDeadError, ConfigError) as error:  # the latter of memory that is not free yet, say
            self.end(stages)  # until the next attempt, what they hold can go
            raise PipelineFaultError(str(error), reason="died", stages=stages) from error

    async def find_silent(self) -> dict[int, str]:
        """Ask every rank for a sign of life; return what is wrong with each stage that gives none."""
        pings = {
            (stage, rank): handle for stage, handles in enumerate(self.ranks) for rank, handle in enumerate(handles)
        }
        answers = await asyncio.gather(*(self._ping(handle) for handle in pings.values()))
        silent: dict[int, str] = {}
        for (stage, rank), answer in zip(pings, answers, strict=True):
            if answer:
                who = f"stage {stage}" if len(self.ranks[stage]) == 1 else f"stage {stage}, rank {rank},"
                silent.setdefault(stage, f"{who} {answer}")
        return silent

    async def check_health(self) -> None:
        """Ask every rank for a sign of life.

        Raises:
            PipelineFaultError: Stages give none; it names them.
        """
        if silent := await self.find_silent():
            is_hung = all("does not answer" in what for what in silent.values())
            raise PipelineFaultError("; ".join(silent.values()), reason="hung" if is_hung else "died", stages=silent)

    @property
    def num_nodes(self) -> int:
        """On how many nodes the pipeline is, its scheduler included."""
        table: dict[str, Any] = placement_group_table(self._placement_group)
        return len(set(table["bundles_to_node_id"].values()))

    async def pids(self) -> list[int]:
        """Return the process ids of all ranks, stage by stage."""
        calls = [
            handle.pid.options(concurrency_group="control").remote() for handles in self.ranks for handle in handles
        ]
        return list(await asyncio.gather(*calls))

    def end(self, stages: Collection[int]) -> None:
        """End the actors of some stages, whatever they do; these stages have none then."""
        for stage in stages:
            for handle in self.ranks[stage]:
                ray.kill(handle)
            self.ranks[stage] = []

    async def _load(self, stages: Collection[int]) -> list[int]:
        """Create the actors of stages; return how many KV blocks each has room for."""
        for stage in stages:
            self.ranks[stage] = [self._create(stage, rank) for rank in range(self._config.tensor_parallel_size)]
        # The first answer of a rank: then it has its place, and its process runs.
        meetings = await self._wait(
            [self.ranks[stage][0].open_meeting.remote() for stage in stages],
            self._config.placement_timeout_s,
            "did not find their place within placement_timeout_s",
        )
        return await self._wait(
            [
                handle.load.remote(meeting)
                for stage, meeting in zip(stages, meetings, strict=True)
                for handle in self.ranks[stage]
            ],
            self._config.load_timeout_s,
            "did not load their weights within load_timeout_s",
        )

    async def _allocate(self, stages: Collection[int]) -> None:
        """Let the ranks of stages allocate their KV caches."""
        await self._wait(
            [rank.start.remote(self._num_blocks) for stage in stages for rank in self.ranks[stage]],
            self._config.load_timeout_s,
            "did not allocate their KV caches within load_timeout_s",
        )

    def _create(self, stage: int, rank: int) -> Any:
        # Steps occupy the actor's default executor for good; calls beside them need a group of their own.
        actor_class: Any = ray.remote(concurrency_groups={"control": 2})(StageActor)  # type: ignore[call-overload]  # not in Ray's stub
        bundle = stage_bundle(self._config)
        num_ranks = self._config.tensor_parallel_size
        strategy = PlacementGroupSchedulingStrategy(
            self._placement_group, placement_group_bundle_index=self._first_bundle + stage
        )
        return actor_class.options(
            num_cpus=bundle["CPU"] / num_ranks,
            num_gpus=bundle.get("GPU", 0) / num_ranks,
            scheduling_strategy=strategy,
        ).remote(self._config, stage=stage, tp_rank=rank, num_threads=num_rank_threads(len(self.ranks) * num_ranks))

    async def _wait(self, calls: list[Any], timeout_s: float, failure: str) -> list[Any]:
        try:
            async with asyncio.timeout(timeout_s):
                return list(await asyncio.gather(*calls))
        except TimeoutError:
            raise EngineDeadError(f"stages {failure}={timeout_s:g}") from None
        except RayError as error:
            if isinstance(cause := getattr(error, "cause", None), ConfigError):
                raise cause from None
            raise EngineDeadError(f"a stage did not come up ({reason_of(error)})") from error

    async def _ping(self, handle: Any) -> str:
        """Return what is wrong with a rank, or nothing."""
        timeout_s = self._config.heartbeat_timeout_s
        try:
            await asyncio.wait_for(handle.pid.options(concurrency_group="control").remote(), timeout_s)
        except TimeoutError:
            return f"does not answer within heartbeat_timeout_s={timeout_s:g}"
        except RayError as error:
            return f"is dead ({type(error).__name__})"
        return ""
