"""What a deployment file asks of a cluster, and whether the cluster has it: all of `sarathi doctor` but Ray."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from itertools import groupby
from statistics import median
from typing import Literal

from rayserve_sarathi.config import AppConfig, EngineConfig, parse
from rayserve_sarathi.deployment_file import IMPORT_PATH, Application
from rayserve_sarathi.engine import check_names
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.execution.memory_estimate import Memory, MemoryEstimate, estimate_memory
from rayserve_sarathi.links import LinkSpeed
from rayserve_sarathi.models.resolve import resolve_folder, resolve_model
from rayserve_sarathi.placement import (
    MAX_DEAD_ENDS,
    Group,
    Node,
    Resources,
    explain_shortage,
    format_resources,
    pipeline_group,
    place,
    resolve_auto,
)

Level = Literal["ok", "warning", "problem", "skipped"]

# GB of each GPU by NVIDIA's data sheets, under Ray's names of accelerator types: the smallest and the largest of that
# name. Taken as 10**9 bytes, which is a little less than what the larger ones have. Ray calls every A100 just so; names
# with a size are for an operator to add.
_GPU_GB = {
    "T4": (16, 16),
    "V100": (16, 32),
    "A10G": (24, 24),
    "L4": (24, 24),
    "L40S": (48, 48),
    "A100": (40, 80),
    "A100-40G": (40, 40),
    "A100-80G": (80, 80),
    "H20": (96, 141),
    "H100": (80, 94),
    "H200": (141, 141),
    "B200": (180, 180),
}
_ACCELERATOR = "accelerator_type:"
_GIB = 1024**3
_MAX_PIPELINES_NAMED = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkResult:
    """What a probe found.

    Args:
        source: Node that connects.
        target: Node that listens; None if the probe did not begin.
        outcome: The link's speed, or what is wrong with it.
    """

    source: str
    target: str | None
    outcome: LinkSpeed | str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One thing that was looked at.

    Args:
        level: A `problem` is what cannot work; a `warning` what may not, or not yet.
        topic: What was looked at.
        text: What was found, in one line.
    """

    level: Level
    topic: Literal["settings", "placement", "memory", "links"]
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Report:
    """All findings: by title of their section."""

    file: str
    nodes: tuple[Node, ...]
    sections: Mapping[str, tuple[Finding, ...]]

    @property
    def can_work(self) -> bool:
        """Whether nothing is known to be impossible."""
        return not any(finding.level == "problem" for findings in self.sections.values() for finding in findings)

    def to_json(self) -> dict[str, object]:
        """Return it for a program to read."""
        return {**asdict(self), "can_work": self.can_work}


def examine(
    file: str,
    applications: Sequence[Application],
    nodes: Sequence[Node],
    links: Sequence[LinkResult],
    *,
    gpu_memory_gib: float | None,
) -> Report:
    """Compare what applications ask for with what a cluster has.

    Args:
        file: Where the applications are from.
        applications: In the order in which they get their places.
        nodes: Of the cluster.
        links: Between its nodes.
        gpu_memory_gib: Of each GPU; None goes by the nodes' accelerator types.
    """
    sections: dict[str, tuple[Finding, ...]] = {}
    groups: list[Group] = []
    for application in applications:
        findings, its_groups = _examine_application(application, nodes, groups, gpu_memory_gib=gpu_memory_gib)
        sections[f"application {application.name}"] = tuple(findings)
        groups += its_groups
    sections["links"] = tuple(_examine_links(nodes, links))
    return Report(file=file, nodes=tuple(nodes), sections=sections)


def render(report: Report) -> str:
    """Return a report for people."""
    lines = [f"{report.file} on a cluster of {_count(len(report.nodes), 'node')}", "", "nodes"]
    lines += [f"  {_describe_node(node)}" for node in report.nodes]
    for title, findings in report.sections.items():
        lines += ["", title, *(f"  {finding.level:<8} {finding.topic}: {finding.text}" for finding in findings)]
    levels = [finding.level for findings in report.sections.values() for finding in findings]
    verdict = "this can work" if report.can_work else "this cannot work"
    counts = [_count(levels.count(level), level) for level in ("problem", "warning") if levels.count(level)]
    skipped = f"{levels.count('skipped')} skipped" if levels.count("skipped") else ""
    lines += ["", f"{verdict}: {', '.join(filter(None, [*counts, skipped])) or 'no problem found'}"]
    return "\n".join(lines) + "\n"


def _examine_application(
    application: Application, nodes: Sequence[Node], groups_before: Sequence[Group], *, gpu_memory_gib: float | None
) -> tuple[list[Finding], list[Group]]:
    """Return what there is to say of an application, and what of it finds room beside those before it."""
    if application.args is None:
        text = f"it is not built by {IMPORT_PATH}, so nothing is known of it"
        return [Finding(level="skipped", topic="settings", text=text)], []
    try:
        config = parse(AppConfig, application.args).engine
        check_names(config)
        config = resolve_auto(config, nodes)
    except ConfigError as error:
        return [Finding(level="problem", topic="settings", text=str(error))], []
    findings = [Finding(level="ok", topic="settings", text=_describe_config(config, application))]

    groups = _pipeline_groups(config, application, application.num_pipelines)
    placement, homes = _examine_placement(config, application, groups, nodes, groups_before)
    findings += [*placement, _examine_memory(config, nodes, homes, gpu_memory_gib=gpu_memory_gib)]
    return findings, groups if homes else []


def _pipeline_groups(config: EngineConfig, application: Application, num_pipelines: int) -> list[Group]:
    names = [f"pipeline {index} of {application.name}" for index in range(num_pipelines)]
    return [pipeline_group(config, name=name) for name in (names if num_pipelines > 1 else [application.name])]


def _examine_placement(
    config: EngineConfig,
    application: Application,
    groups: Sequence[Group],
    nodes: Sequence[Node],
    groups_before: Sequence[Group],
) -> tuple[list[Finding], tuple[str, ...]]:
    """Return findings, and the nodes of the first pipeline's bundles; none if they cannot be placed."""

    def finding(level: Level, text: str) -> Finding:
        return Finding(level=level, topic="placement", text=text)

    placed = place([*groups_before, *groups], {node.name: node.total for node in nodes})
    if placed is None:
        shortage = explain_shortage([*groups_before, *groups], nodes)
        if shortage is None:
            return [finding("warning", f"no room found in {MAX_DEAD_ENDS:,} tries, after which the search ends")], ()
        if config.wait_for_nodes:
            return [finding("warning", f"waits until the cluster adds nodes (wait_for_nodes): {shortage}")], ()
        return [finding("problem", f"can never be placed: {shortage}")], ()
    mine = placed[len(groups_before) :]
    findings = [finding("ok", _describe_places(groups, mine))]
    if (shortage := explain_shortage(groups, nodes, now=True)) is not None:
        findings.append(finding("warning", f"not at present, as other things run: {shortage}"))
    if application.max_pipelines > application.num_pipelines:
        all_groups = _pipeline_groups(config, application, application.max_pipelines)
        if (shortage := explain_shortage([*groups_before, *all_groups], nodes)) is not None:
            text = f"not all {application.max_pipelines} pipelines that it may scale up to: {shortage}"
            findings.append(finding("warning", text))
    return findings, mine[0]


def _examine_memory(
    config: EngineConfig, nodes: Sequence[Node], homes: Sequence[str], *, gpu_memory_gib: float | None
) -> Finding:
    def finding(level: Level, text: str) -> Finding:
        return Finding(level=level, topic="memory", text=text)

    try:
        resolve_folder(config.model, config.revision)
    except ConfigError as error:
        return finding("skipped", f"there is no config.json to go by: {error}")
    try:
        info = resolve_model(config)
        memories = _find_memories(config, nodes, homes, gpu_memory_gib=gpu_memory_gib)
        if isinstance(memories, str):
            return finding("skipped", memories)
        smallest, largest = ([sizes[index] for sizes in memories] for index in (0, -1))
        estimate = estimate_memory(config, info, smallest)
        if estimate.problem is None:
            return finding("ok", _describe_memory(config, estimate))
        problem, estimate = estimate.problem, estimate_memory(config, info, largest)
    except ConfigError as error:
        return finding("problem", str(error))
    if estimate.problem is not None:
        return finding("problem", estimate.problem)
    return finding(
        "warning",
        f"GPUs of this name have several sizes. With the largest, {_describe_memory(config, estimate)}. With the"
        f" smallest, {problem}. Say which with --gpu-memory-gib",
    )


def _find_memories(
    config: EngineConfig, nodes: Sequence[Node], homes: Sequence[str], *, gpu_memory_gib: float | None
) -> list[tuple[Memory, ...]] | str:
    """Return of each stage the memory, or the smallest and the largest that it may have; or why it is not known."""
    is_cuda = config.device == "cuda"
    if is_cuda and gpu_memory_gib is not None:
        return [(Memory(name="GPU", num_bytes=int(gpu_memory_gib * _GIB)),)] * config.pipeline_parallel_size
    if not homes:
        return "where the stages would be is not known" + ("; give --gpu-memory-gib" if is_cuda else "")
    # The first bundle is the scheduler's; inline stages are in its process.
    stage_homes = [homes[0]] * config.pipeline_parallel_size if config.transport == "inline" else homes[1:]
    by_name = {node.name: node for node in nodes}
    memories: list[tuple[Memory, ...]] = []
    for home in stage_homes:
        total = by_name[home].total
        if is_cuda:
            kinds = _accelerators(total)
            sizes = [size for kind in kinds if kind in _GPU_GB for size in _GPU_GB[kind]]
            if not sizes:
                return f"no GPU memory is known for {home} (accelerator types: {kinds}); give --gpu-memory-gib"
            memories.append(tuple(Memory(name=home, num_bytes=size * 10**9) for size in (min(sizes), max(sizes))))
        elif "memory" in total:
            memories.append((Memory(name=home, num_bytes=int(total["memory"])),))
        else:
            return f"Ray counts no memory on {home}"
    return memories


def _accelerators(resources: Resources) -> list[str]:
    """Return the accelerator types of a node; not `A100` beside `A100-80G`, which says more."""
    kinds = [name.removeprefix(_ACCELERATOR) for name in resources if name.startswith(_ACCELERATOR)]
    return [kind for kind in kinds if not any(other.startswith(f"{kind}-") for other in kinds)]


def _describe_memory(config: EngineConfig, estimate: MemoryEstimate) -> str:
    weight_bytes = max(stage.weight_bytes for stage in estimate.stages)
    kv_token_bytes = max(stage.kv_token_bytes for stage in estimate.stages)
    rank = "a rank" if config.tensor_parallel_size > 1 else "a stage"
    return (
        f"{rank} holds up to {weight_bytes / _GIB:,.2f} GiB of weights and {kv_token_bytes / 1024:,.2f} KiB of KV a"
        f" token; there is room for about"
        f" {estimate.num_tokens:,} tokens: {_count(estimate.num_requests, 'request')} of"
        f" max_model_len={estimate.max_model_len:,}"
    )


def _examine_links(nodes: Sequence[Node], links: Sequence[LinkResult]) -> list[Finding]:
    def finding(level: Level, text: str) -> Finding:
        return Finding(level=level, topic="links", text=text)

    if len(nodes) < 2:
        return [finding("ok", "a single node has none")]
    findings = []
    speeds: dict[str, LinkSpeed] = {}
    for link in links:
        name = link.source if link.target is None else f"{link.source} -> {link.target}"
        if isinstance(link.outcome, str):
            findings.append(finding("problem", f"{name}: {link.outcome}"))
        else:
            speeds[name] = link.outcome
    if speeds:
        rates = [speed.bytes_per_s for speed in speeds.values()]
        trips = [speed.round_trip_s for speed in speeds.values()]
        slowest = min(speeds, key=lambda name: speeds[name].bytes_per_s)
        text = (
            f"{_count(len(speeds), 'link')} probed: round trips of {min(trips) * 1e3:.2f} to {max(trips) * 1e3:.2f} ms,"
            f" {_gbit(min(rates))} to {_gbit(max(rates))} Gbit/s over one TCP connection"
        )
        findings.insert(0, finding("ok", text))
        if len(speeds) > 2 and min(rates) < median(rates) / 4:
            text = f"{slowest}: {_gbit(min(rates))} Gbit/s, less than a quarter of what others have"
            findings.append(finding("warning", text))
    return findings


def _describe_config(config: EngineConfig, application: Application) -> str:
    num_ranks = config.tensor_parallel_size
    stages = _count(config.pipeline_parallel_size, "stage") + (f" of {num_ranks} ranks" if num_ranks > 1 else "")
    low, high = application.num_pipelines, application.max_pipelines
    pipelines = _count(low, "pipeline") if low == high else f"{low} to {high} pipelines"
    return f"{config.model} on {config.device}, {pipelines} of {stages}"


def _describe_places(groups: Sequence[Group], placed: Sequence[Sequence[str]]) -> str:
    texts = []
    for group, names in list(zip(groups, placed, strict=True))[:_MAX_PIPELINES_NAMED]:
        pairs = zip((bundle.name for bundle in group.bundles), names, strict=True)
        by_node = groupby(sorted(pairs, key=lambda pair: names.index(pair[1])), key=lambda pair: pair[1])
        places = [f"{' and '.join(bundle for bundle, _ in bundles)} on {node}" for node, bundles in by_node]
        texts.append(", ".join(places) if len(groups) == 1 else f"{group.name}: {', '.join(places)}")
    if len(groups) > _MAX_PIPELINES_NAMED:
        texts.append(f"and {len(groups) - _MAX_PIPELINES_NAMED} more pipelines")
    return "there is room, for instance with " + "; ".join(texts)


def _describe_node(node: Node) -> str:
    kinds = _accelerators(node.total)
    shown = {name: node.total.get(name, 0.0) for name in ("GPU", "CPU")}
    free = {name: node.available.get(name, 0.0) for name in ("GPU", "CPU")}
    memory = f", {node.total['memory'] / _GIB:,.1f} GiB" if "memory" in node.total else ""
    kind = f" ({', '.join(kinds)})" if kinds else ""
    return f"{node.name}: {format_resources(shown)}{kind}{memory}; free now: {format_resources(free)}"


def _gbit(bytes_per_s: float) -> str:
    return f"{bytes_per_s * 8 / 1e9:,.1f}"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}" + ("" if number == 1 else "s")
