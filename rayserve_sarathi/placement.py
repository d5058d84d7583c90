"""Whether the nodes of a cluster can hold what pipelines reserve, and who is short of what where they cannot.

Ray places a group of bundles whole or not at all, and waits without a word while it cannot. Its own search is greedy;
this one is exact, so "never" means never; where that takes too long it gives up. Amounts are in Ray's unit, 1/10000.
"""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import le
from typing import NamedTuple, TypeVar

from rayserve_sarathi.config import EngineConfig, PlacementStrategy
from rayserve_sarathi.errors import ConfigError

Resources = Mapping[str, float]
_Config = TypeVar("_Config", bound=EngineConfig)

SCHEDULER_CPUS = 0.1
MAX_DEAD_ENDS = 20_000
"""Of a search. Pipelines of one kind on nodes of one kind meet few; the number of ways to mix kinds explodes."""
_UNITS = 10_000
_MAX_NODES_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Node:
    """A node of the cluster, as Ray counts its resources.

    Args:
        name: Its address, for messages; with a part of its id where several nodes have the same.
        node_id: Ray's.
        total: What it has.
        available: What of it is free.
    """

    name: str
    node_id: str
    total: Resources
    available: Resources


@dataclass(frozen=True, slots=True, kw_only=True)
class Bundle:
    """Resources that are reserved on one node.

    Args:
        name: Of what uses them, such as `stage 1`.
        needs: How much.
        advice: What else would help than a larger node.
    """

    name: str
    needs: Resources
    advice: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Group:
    """Bundles that are reserved together: those of one pipeline."""

    name: str
    bundles: tuple[Bundle, ...]
    strategy: PlacementStrategy


def resolve_auto(config: _Config, nodes: Sequence[Node]) -> _Config:
    """Return a configuration with what `device` and `transport` mean in a cluster, so that all its processes agree.

    Raises:
        ConfigError: Nodes with GPUs may be still to come, so that `device: auto` says nothing.
    """
    device = config.device
    if device == "auto" and any(node.total.get("GPU") for node in nodes):
        device = "cuda"
    elif device == "auto":
        if config.wait_for_nodes:
            raise ConfigError(
                "device is auto and no node has a GPU, but with wait_for_nodes: true such nodes may be still to come;"
                " say device: cuda or device: cpu"
            )
        device = "cpu"
    transport = config.transport
    if transport == "auto":
        # Between nodes compiled graphs may stand still (Ray up to 2.60, ray-project/ray#58426).
        is_on_one_node = config.placement_strategy == "STRICT_PACK"
        transport = "compiled_graph" if device == "cuda" and is_on_one_node else "socket"
    return replace(config, device=device, transport=transport)


def stage_bundle(config: EngineConfig) -> dict[str, float]:
    """Return what a stage reserves, for all its ranks: a bundle is on one node, and so are they.

    A GPU rank has a GPU to itself.
    """
    num_ranks = config.tensor_parallel_size
    if config.device == "cuda":
        return {"GPU": float(num_ranks), "CPU": (config.num_cpus_per_rank or 1.0) * num_ranks}
    return {"CPU": (config.num_cpus_per_rank or 0.25) * num_ranks}


def pipeline_group(config: EngineConfig, *, name: str = "pipeline") -> Group:
    """Return what a pipeline reserves: the first bundle is the scheduler's own, then comes one for each stage.

    Args:
        config: The engine's, after `resolve_auto`.
        name: What messages call the pipeline.
    """
    scheduler = {"CPU": SCHEDULER_CPUS}
    if config.transport == "inline":
        if config.device == "cuda":
            scheduler["GPU"] = 1.0
        return Group(
            name=name, bundles=(Bundle(name="the scheduler", needs=scheduler),), strategy=config.placement_strategy
        )
    advice = "lower tensor_parallel_size" if config.tensor_parallel_size > 1 else ""
    stages = (
        Bundle(name=f"stage {stage}", needs=stage_bundle(config), advice=advice)
        for stage in range(config.pipeline_parallel_size)
    )
    return Group(
        name=name,
        bundles=(Bundle(name="the scheduler", needs=scheduler), *stages),
        strategy=config.placement_strategy,
    )


def place(groups: Sequence[Group], capacities: Mapping[str, Resources]) -> tuple[tuple[str, ...], ...] | None:
    """Find room for all groups at once.

    Args:
        groups: What to place.
        capacities: What each node has, by its name.

    Returns:
        Of each group, its bundles' nodes; None if there is no room, or, with many groups of several kinds, if none was
        found after `MAX_DEAD_ENDS`. PACK and SPREAD are wishes that the choice of nodes follows where it can, as Ray's
        does; it need not be Ray's choice.
    """
    try:
        return _Search(groups, capacities).run()
    except _GivenUpError:
        return None


def explain_shortage(groups: Sequence[Group], nodes: Sequence[Node], *, now: bool = False) -> str | None:
    """Return why the groups find no room, or None if they do, or if the search was given up: see `place`.

    Args:
        groups: What to place.
        nodes: All nodes of the cluster.
        now: Count what is free at present, not what nodes have in all: say what groups wait for, not whether they can
            ever be placed.
    """
    capacities = {node.name: node.available if now else node.total for node in nodes}
    try:
        if _Search(groups, capacities).run() is not None:
            return None
        if not nodes:
            return "the cluster has no node; start one with ray start"
        fitting, placed = _longest_fitting(groups, capacities)
    except _GivenUpError:
        return None
    num_placed = len(fitting[-1].bundles) if fitting else 0
    group = groups[len(fitting) - 1] if fitting else groups[0]
    if num_placed == len(group.bundles):
        group, num_placed = groups[len(fitting)], 0
    return _explain(group, num_placed, fitting, placed, nodes, now=now)


def format_resources(resources: Resources) -> str:
    """Return resources as text, such as `4 GPU and 4 CPU`."""
    order = sorted(resources, key=lambda name: (name != "GPU", name != "CPU", name))
    return " and ".join(f"{_number(resources[name])} {name}" for name in order if resources[name]) or "nothing"


def _longest_fitting(
    groups: Sequence[Group], capacities: Mapping[str, Resources]
) -> tuple[list[Group], tuple[tuple[str, ...], ...]]:
    """Return the longest beginning of all bundles, in order, that finds room, and where; all of them do not."""
    fitting: list[Group] = []
    placed: tuple[tuple[str, ...], ...] = ()
    # Whatever finds room, each beginning of it does: so halve what is between the two.
    low, high = 0, sum(len(group.bundles) for group in groups)
    while high - low > 1:
        middle = (low + high) // 2
        beginning = _first_bundles(groups, middle)
        if (found := _Search(beginning, capacities).run()) is None:
            high = middle
        else:
            low, fitting, placed = middle, beginning, found
    return fitting, placed


def _first_bundles(groups: Sequence[Group], count: int) -> list[Group]:
    beginning = []
    for group in groups:
        if count > 0:
            beginning.append(replace(group, bundles=group.bundles[:count]))
        count -= len(group.bundles)
    return beginning


def _explain(
    group: Group,
    num_placed: int,
    fitting: Sequence[Group],
    placed: Sequence[Sequence[str]],
    nodes: Sequence[Node],
    *,
    now: bool,
) -> str:
    """Say what the bundle `num_placed` of `group` lacks on each node, once the bundles before it are placed."""
    bundle = group.bundles[num_placed]
    is_whole = group.strategy == "STRICT_PACK"
    bundles = group.bundles if is_whole else (bundle,)
    needs = _sum(other.needs for other in bundles)
    # Of a group that must be on one node nothing is placed before the rest of it is.
    kept = [
        (other, name)
        for others, names in zip(fitting, placed, strict=True)
        if not (is_whole and others.name == group.name)
        for other, name in zip(others.bundles, names, strict=True)
    ]
    taken_by_group = (
        set(placed[-1]) if num_placed and fitting[-1].name == group.name and group.strategy == "STRICT_SPREAD" else ()
    )
    lines: list[tuple[float, str]] = []
    for node in nodes:
        total = node.available if now else node.total
        used = _sum(other.needs for other, name in kept if name == node.name)
        short = {
            name: amount - left
            for name, amount in needs.items()
            if (left := max(0.0, total.get(name, 0.0) - used.get(name, 0.0))) < amount - 0.5 / _UNITS
        }
        if node.name in taken_by_group:
            lines.append((0.0, f"{node.name} has another bundle of this pipeline already (STRICT_SPREAD)"))
        else:
            has = ", ".join(
                f"{_number(max(0.0, total.get(name, 0.0) - used.get(name, 0.0)))} of"
                f" {_number(node.total.get(name, 0.0))} {name}"
                for name in short
            )
            lines.append((sum(short.values()), f"{node.name} is short of {format_resources(short)} ({has} left)"))
    lines.sort(key=lambda line: line[0])
    named = "; ".join(text for _, text in lines[:_MAX_NODES_NAMED])
    if len(lines) > _MAX_NODES_NAMED:
        named += f"; {len(lines) - _MAX_NODES_NAMED} other nodes lack as much or more"
    who = f"all of {group.name} (STRICT_PACK)" if is_whole else f"{bundle.name} of {group.name}"
    verb = "waits for" if now else "needs"
    advice = [f"add a node with {format_resources(needs)}", *dict.fromkeys(b.advice for b in bundles if b.advice)]
    if group.strategy.startswith("STRICT"):
        advice.append(f"use placement_strategy: {group.strategy.removeprefix('STRICT_')}")
    return f"{who} {verb} {format_resources(needs)} on one node; {named}; {', or '.join(advice)}"


def _sum(parts: Iterable[Resources]) -> dict[str, float]:
    total: dict[str, float] = {}
    for part in parts:
        for name, amount in part.items():
            total[name] = total.get(name, 0.0) + amount
    return total


def _number(amount: float) -> str:
    return f"{round(amount, 4):,.10g}" if amount < 1e6 else f"{amount:,.0f}"


_Vector = tuple[int, ...]
"""An amount of each resource that anyone needs, in Ray's unit."""


class _Item(NamedTuple):
    """Bundles of a group that go to one node together: one, or with STRICT_PACK all."""

    group: int
    bundles: tuple[int, ...]
    needs: _Vector


class _GivenUpError(Exception):
    """A search has met too many dead ends: nothing is known."""


class _Search:
    """Exact search, item by item, that gives up a branch as soon as some kind of item cannot all find room."""

    def __init__(self, groups: Sequence[Group], capacities: Mapping[str, Resources]) -> None:
        self._groups = groups
        self._nodes = list(capacities)
        names = sorted({name for group in groups for bundle in group.bundles for name in bundle.needs})
        self._left: list[_Vector] = [
            tuple(round(capacity.get(name, 0.0) * _UNITS) for name in names) for capacity in capacities.values()
        ]
        self._items = [item for index in range(len(groups)) for item in self._items_of(index, names)]
        self._node_of: list[int] = []
        """Nodes of the first items, which have their place."""
        self._begins: list[int] = []
        """Of each item, the first one of its group."""
        for index, item in enumerate(self._items):
            is_first = index == 0 or self._items[index - 1].group != item.group
            self._begins.append(index if is_first else self._begins[-1])
        self._dead_ends: dict[int, set[tuple[tuple[_Vector, bool], ...]]] = {}
        self._num_dead_ends = 0
        # For `_may_fit`: of each kind of item and of each resource, what those from an index on want, and what is left.
        self._kinds = sorted({item.needs for item in self._items if any(item.needs)})
        self._wanted = [(*(0 for _ in self._kinds), *(0 for _ in names))]
        for item in reversed(self._items):
            step = (*(int(item.needs == kind) for kind in self._kinds), *item.needs)
            self._wanted.append(_plus(self._wanted[-1], step))
        self._wanted.reverse()
        self._room = _plus(self._wanted[-1], *map(self._room_in, self._left))

    def run(self) -> tuple[tuple[str, ...], ...] | None:
        # Of each item up to the first without a place, the nodes still to be tried. They may be too many to recurse.
        branches: list[Iterator[int]] = []
        while (index := len(self._node_of)) < len(self._items):
            if len(branches) == index:
                branches.append(self._choose(index))
            node = next(branches[-1], None)
            if node is not None:
                self._take(node, self._items[index].needs)
                self._node_of.append(node)
                continue
            branches.pop()
            self._num_dead_ends += 1
            if self._num_dead_ends > MAX_DEAD_ENDS:
                raise _GivenUpError
            self._dead_ends.setdefault(index, set()).add(self._state(index))
            if index == 0:
                return None
            self._take(self._node_of.pop(), _minus(self._items[index - 1].needs))
        nodes = [[""] * len(group.bundles) for group in self._groups]
        for item, node in zip(self._items, self._node_of, strict=True):
            for bundle in item.bundles:
                nodes[item.group][bundle] = self._nodes[node]
        return tuple(map(tuple, nodes))

    def _items_of(self, index: int, names: Sequence[str]) -> list[_Item]:
        group = self._groups[index]
        vectors = [tuple(round(bundle.needs.get(name, 0.0) * _UNITS) for name in names) for bundle in group.bundles]
        if group.strategy == "STRICT_PACK":
            return [_Item(index, tuple(range(len(vectors))), _plus(*vectors))]
        largest_first = sorted(range(len(vectors)), key=lambda bundle: sum(vectors[bundle]), reverse=True)
        return [_Item(index, (bundle,), vectors[bundle]) for bundle in largest_first]

    def _choose(self, index: int) -> Iterator[int]:
        """Yield the nodes that an item may go to, one of each kind, the preferred first."""
        if not self._may_fit(index) or (index in self._dead_ends and self._state(index) in self._dead_ends[index]):
            return
        item = self._items[index]
        used = self._used(index)
        strategy = self._groups[item.group].strategy
        tried: set[tuple[_Vector, bool]] = set()
        for node in self._by_preference(used, strategy):
            left = self._left[node]
            kind = (left, node in used)
            if kind in tried or (strategy == "STRICT_SPREAD" and node in used):
                continue
            tried.add(kind)
            if all(need <= have for need, have in zip(item.needs, left, strict=True)):
                yield node

    def _used(self, index: int) -> list[int]:
        """Return the nodes that have items of this item's group already."""
        return self._node_of[self._begins[index] : index]

    def _state(self, index: int) -> tuple[tuple[_Vector, bool], ...]:
        """Return all that matters for the items from `index` on."""
        used = self._used(index)
        return tuple(sorted((left, node in used) for node, left in enumerate(self._left)))

    def _take(self, node: int, needs: _Vector) -> None:
        before = self._left[node]
        after = _plus(before, _minus(needs))
        self._left[node] = after
        self._room = _plus(self._room, self._room_in(after), _minus(self._room_in(before)))

    def _room_in(self, left: _Vector) -> _Vector:
        """Return how many items of each kind, were it alone, find room in what is left of a node; and what is left."""
        return (*(_times(kind, left) for kind in self._kinds), *left)

    def _may_fit(self, index: int) -> bool:
        """Whether, were each kind of item alone, all that are left of it would find room; and all together by sums."""
        return bool(self._left) and all(map(le, self._wanted[index], self._room))

    def _by_preference(self, used: Sequence[int], strategy: str) -> list[int]:
        nodes = sorted(range(len(self._left)), key=lambda node: self._left[node], reverse=True)
        return sorted(nodes, key=lambda node: node not in used) if "PACK" in strategy else sorted(nodes, key=used.count)


def _plus(*vectors: _Vector) -> _Vector:
    return tuple(map(sum, zip(*vectors, strict=True)))


def _minus(vector: _Vector) -> _Vector:
    return tuple(-amount for amount in vector)


def _times(needs: _Vector, left: _Vector) -> int:
    """Return how often `needs`, which is not nothing, fits into `left`."""
    return max(0, min(have // need for need, have in zip(needs, left, strict=True) if need))
