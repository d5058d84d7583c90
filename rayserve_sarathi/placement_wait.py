"""How long the pipelines of an application have waited for their place, and what for."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.placement import Node, explain_shortage, pipeline_group

_PATIENCE_S = 10.0
"""Where there is room, Ray has used it before this."""


def explain_waiting(config: EngineConfig, waiting: Sequence[Collection[int]], nodes: Sequence[Node]) -> str | None:
    """Return what pipelines wait for; None if there is room for all that they lack.

    Args:
        config: The engine's, after `placement.resolve_auto`.
        waiting: Of each pipeline that waits, the bundles that have no node: all, or those whose node was lost.
        nodes: All nodes of the cluster.
    """
    if not waiting:
        return None
    names = [f"pipeline {index}" for index in range(len(waiting))] if len(waiting) > 1 else ["the pipeline"]
    groups = [pipeline_group(config, name=name) for name in names]
    # What can never be placed is said so, whatever is free now.
    if (shortage := explain_shortage(groups, nodes)) is not None:
        return shortage
    # What a pipeline has is not free, and it does not wait for it.
    missing = [
        replace(group, bundles=tuple(bundle for index, bundle in enumerate(group.bundles) if index in indices))
        for group, indices in zip(groups, waiting, strict=True)
        if indices
    ]
    return explain_shortage(missing, nodes, now=True)


class PlacementWait:
    """Since when pipelines wait, from one look at the cluster to the next.

    Args:
        config: The engine's.
    """

    def __init__(self, config: EngineConfig) -> None:
        self._config = config
        self._since_s: dict[str, float] = {}
        self.news: str | None = None
        """What pipelines wait for, and how long they have; None while there is nothing to tell."""
        self.explanation: str | None = None
        """The same, for clients; None also while some pipeline has its place."""
        self.is_overdue = False
        """Whether no pipeline has found its place within `placement_timeout_s`."""

    def note(
        self, waiting: Mapping[str, Collection[int]], shortage: str | None, *, num_placed: int, now_s: float
    ) -> None:
        """Take in what a look has found.

        Args:
            waiting: Placement groups that wait, by id, with the bundles that have no node.
            shortage: What `explain_waiting` says of them.
            num_placed: Pipelines that have their place.
            now_s: Time of the look, monotonic.
        """
        self._since_s = {group: self._since_s.get(group, now_s) for group in waiting}
        waited_s = now_s - min(self._since_s.values(), default=now_s)
        self.news = None
        if shortage is not None or waited_s >= _PATIENCE_S:
            reason = shortage or "there seems to be room, but Ray has not placed it; see `ray status`"
            self.news = f"{self._config.model_name} has waited {waited_s:.0f} s for its place: {reason}"
        self.explanation = None if num_placed else self.news
        self.is_overdue = self.explanation is not None and waited_s > self._config.placement_timeout_s
