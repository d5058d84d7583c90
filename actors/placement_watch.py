"""Why a pipeline of this application has no place yet, as Ray itself does not say."""

import asyncio
import logging
import time
from concurrent.futures import ThreadPoolExecutor

from ray.util.placement_group import placement_group_table

from rayserve_sarathi.actors.nodes import cluster_nodes
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.placement_wait import PlacementWait, explain_waiting

logger = logging.getLogger(__name__)

_LOOK_PERIOD_S = 5.0
_LOG_PERIOD_S = 30.0


class PlacementWatch:
    """Looks at the placement groups that Serve makes for the schedulers of an application, and logs what they wait for.

    Args:
        app_name: The application's.
        config: The engine's, after `placement.resolve_auto`.
    """

    def __init__(self, app_name: str, config: EngineConfig) -> None:
        self._config = config
        # Serve names the group after the replica.
        self._prefix = f"SERVE_REPLICA::{app_name}#SchedulerActor#"
        # Serve shuts the loop's own threads down while a replica drains.
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="placement")
        self._wait = PlacementWait(config)
        self._last_log_s = -_LOG_PERIOD_S

    @property
    def is_overdue(self) -> bool:
        """Whether no pipeline has found its place within `placement_timeout_s`."""
        return self._wait.is_overdue

    @property
    def explanation(self) -> str | None:
        """What pipelines wait for; None while all have a place, or some do."""
        return self._wait.explanation

    async def run(self) -> None:
        """Look now and then, for ever."""
        loop = asyncio.get_running_loop()
        while True:
            try:
                waiting, num_placed, shortage = await loop.run_in_executor(self._thread, self._look)
                self._wait.note(waiting, shortage, num_placed=num_placed, now_s=time.monotonic())
                self._log()
            except Exception:  # whatever it is: the watch explains and decides nothing, and the next look may work
                logger.warning("could not look at placement groups", exc_info=True)
            await asyncio.sleep(_LOOK_PERIOD_S)

    def check(self) -> None:
        """Raise EngineDeadError if it `is_overdue`."""
        if self.is_overdue:
            raise EngineDeadError(self.explanation)

    def _look(self) -> tuple[dict[str, list[int]], int, str | None]:
        """Return which groups wait, for which bundles; how many have their place; why the waiting ones have none."""
        groups = [group for group in placement_group_table().values() if group["name"].startswith(self._prefix)]
        num_placed = sum(group["state"] == "CREATED" for group in groups)
        groups = [group for group in groups if group["state"] in ("PENDING", "RESCHEDULING")]
        if not groups:
            return {}, num_placed, None
        nodes = cluster_nodes()
        node_ids = {node.node_id for node in nodes}
        waiting = {
            group["placement_group_id"]: [
                index for index, node_id in group["bundles_to_node_id"].items() if node_id not in node_ids
            ]
            for group in groups
        }
        return waiting, num_placed, explain_waiting(self._config, list(waiting.values()), nodes)

    def _log(self) -> None:
        now_s = time.monotonic()
        if self._wait.news is not None and now_s - self._last_log_s >= _LOG_PERIOD_S:
            self._last_log_s = now_s
            logger.warning("%s", self._wait.news)
