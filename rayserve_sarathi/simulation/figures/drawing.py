"""Draw the series with matplotlib; nothing is computed here but what a label needs.

Colours are Okabe and Ito's (2008), which people with any kind of colour vision tell apart. No state of matplotlib's is
changed: figures are made without pyplot, and the style holds while one is drawn and saved.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator, ScalarFormatter

from rayserve_sarathi.simulation.figures.bubbles import BubbleSeries
from rayserve_sarathi.simulation.figures.capacities import CapacityBars, CapacityCurves
from rayserve_sarathi.simulation.figures.chunking import ChunkingSeries
from rayserve_sarathi.simulation.figures.linear_layers import LinearLayerSeries
from rayserve_sarathi.simulation.figures.operators import LINEAR, OperatorSeries, linear_share
from rayserve_sarathi.simulation.figures.stalls import StallSeries
from rayserve_sarathi.simulation.figures.throughput import ThroughputSeries

_BLACK, _ORANGE, _SKY, _GREEN, _YELLOW, _BLUE, _RED, _PINK = (
    "#000000",
    "#E69F00",
    "#56B4E9",
    "#009E73",
    "#F0E442",
    "#0072B2",
    "#D55E00",
    "#CC79A7",
)
_GREY = "#999999"
_CYCLE = (_BLUE, _RED, _GREEN, _PINK, _ORANGE, _SKY, _BLACK)
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_POLICY_COLOURS = {
    "faster_transformer": _GREY,
    "orca": _PINK,
    "vllm": _RED,
    "hybrid_only": _ORANGE,
    "chunked_only": _SKY,
    "sarathi": _BLUE,
}
_KIND_COLOURS = {"prefill": _RED, "mixed": _GREEN, "decode": _SKY}
_STYLE: Any = {
    "font.size": 10,
    "axes.titlesize": 11,
    "axes.labelsize": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "axes.axisbelow": True,
    "grid.color": "#DDDDDD",
    "grid.linewidth": 0.7,
    "legend.facecolor": "white",
    "legend.edgecolor": "none",
    "legend.framealpha": 0.9,
    "legend.fontsize": 9,
    "lines.linewidth": 1.8,
    "lines.markersize": 5,
}
_DPI = 150


def save(draw: Callable[[Any, str], Figure], series: object, title: str, path: Path) -> None:
    """Draw `series` with one of the functions below and write it as PNG."""
    with rc_context(_STYLE):
        draw(series, title).savefig(path, dpi=_DPI)


def draw_throughput(series: ThroughputSeries, title: str) -> Figure:
    """Draw prefills and decodes beside each other."""
    figure, (prefill, decode) = _figure(f"Throughput against batch size\n{title}", 1, 2, size=(9, 4))
    sizes = series.batch_sizes
    for axes, values, name, colour in (
        (prefill, series.prefill_tokens_per_s, f"prefill of {series.num_tokens}-token prompts", _RED),
        (decode, series.decode_tokens_per_s, f"decode with {series.num_tokens} tokens of context", _BLUE),
    ):
        axes.plot(sizes, values, marker="o", color=colour, label="predicted")
        axes.set(title=name, xlabel="requests in a step", ylabel="tokens / s", ylim=(0, 1.2 * max(values)))
        axes.set_xticks(range(0, max(sizes) + 1, 16))
    ideal = [series.decode_tokens_per_s[0] * size / sizes[0] for size in sizes]
    decode.plot(sizes, ideal, linestyle=":", color=_GREY, label="in proportion to the batch")
    decode.legend(loc="upper left")
    return figure


def draw_operators(series: OperatorSeries, title: str) -> Figure:
    """Draw stacked bars, and the share of the linear layers above each."""
    figure, panels = _figure(f"Time by operator (share of linear layers above each bar)\n{title}", 1, 2, size=(10, 4.6))
    names = (
        "one prompt in a step",
        f"{series.num_decodes} decodes in a step",
    )
    places = range(len(series.lengths))
    for axes, groups_s, name in zip(panels, (series.prefill_s, series.decode_s), names, strict=True):
        bottoms = [0.0] * len(series.lengths)
        for (group, values), colour in zip(
            groups_s.items(), (_BLUE, _SKY, _RED, _ORANGE, _GREEN, _PINK, _GREY), strict=True
        ):
            heights = [1000 * value for value in values]
            axes.bar(places, heights, bottom=bottoms, color=colour, label=group, width=0.7)
            bottoms = [bottom + height for bottom, height in zip(bottoms, heights, strict=True)]
        for place, top in zip(places, bottoms, strict=True):
            axes.annotate(
                f"{linear_share(groups_s, place):.0%}", (place, top), (0, 3), textcoords="offset points", ha="center"
            )
        axes.set(title=name, ylabel="ms per step", ylim=(0, 1.1 * max(bottoms)))
        axes.set_xlabel("prompt tokens" if axes is panels[0] else "tokens of context of each request")
        axes.set_xticks(places, [str(length) for length in series.lengths])
        axes.grid(visible=False, axis="x")
    handles, labels = panels[0].get_legend_handles_labels()
    labels = [f"{label} (linear)" if label in LINEAR else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4)
    return figure


def draw_linear_layers(series: LinearLayerSeries, title: str) -> Figure:
    """Draw the intensity, and the time with its two lines and their knee."""
    figure, (intensity, time) = _figure(f"Linear layers: intensity and knee\n{title}", 1, 2, size=(10, 4.2))
    tokens = series.num_tokens
    intensity.plot(tokens, series.flops_per_byte, color=_BLUE, label="linear layers")
    intensity.axhline(
        series.balance, color=_RED, linestyle="--", label=f"balance that programs reach: {series.balance:.3g}"
    )
    if series.balance_tokens is not None:
        intensity.axvline(
            series.balance_tokens, color=_GREY, linestyle=":", label=f"reached at {series.balance_tokens:.0f} tokens"
        )
    intensity.set(ylabel="FLOP / byte", title="arithmetic intensity", yscale="log")
    milliseconds = [1000 * value for value in series.time_s]
    time.plot(tokens, milliseconds, color=_BLUE, label="linear layers of all stages")
    time.axhline(milliseconds[0], color=_ORANGE, linestyle="--", linewidth=1.2, label="reading the weights")
    rates = [milliseconds[-1] * number / tokens[-1] for number in tokens]
    time.plot(tokens, rates, color=_GREEN, linestyle="--", linewidth=1.2, label="in proportion to the tokens")
    time.axvline(series.knee_tokens, color=_GREY, linestyle=":", label=f"knee at {series.knee_tokens:.0f} tokens")
    time.set(ylabel="ms per step", title="time", yscale="log", ylim=(milliseconds[0] / 3, milliseconds[-1] * 1.5))
    for axes in (intensity, time):
        axes.set_xscale("log", base=2)
        axes.set_xlabel("tokens in the step")
        _plain_ticks(axes, [number for number in tokens if number & (number - 1) == 0][::2])
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.legend(loc="upper left" if axes is time else "lower right")
    return figure


def draw_chunking(series: ChunkingSeries, title: str) -> Figure:
    """Draw a line for each prompt."""
    figure, (axes,) = _figure(f"Prefill in chunks over prefill in one step\n{title}", 1, 1, size=(7, 4.4))
    for row, (prompt_len, whole_s) in enumerate(zip(series.prompt_lens, series.whole_s, strict=True)):
        points = [
            (size, time)
            for size, time in zip(series.chunk_sizes, series.relative_times[row], strict=True)
            if time is not None
        ]
        axes.plot(
            [size for size, _ in points],
            [time for _, time in points],
            marker=_MARKERS[row],
            color=_CYCLE[row],
            label=f"{prompt_len} tokens ({_seconds(whole_s)} as a whole)",
        )
    axes.axhline(1.0, color=_GREY, linestyle=":")
    axes.set_xscale("log", base=2)
    axes.set(xlabel="tokens of a chunk", ylabel="time / time in one step")
    _plain_ticks(axes, series.chunk_sizes)
    axes.legend(title="prompt", alignment="left")
    return figure


def draw_stalls(series: StallSeries, title: str) -> Figure:
    """Draw every gap for each policy, and the tokens of one request under all of them."""
    heading = f"Generation stalls: {series.num_requests} requests, {series.rate:.2f} / s, budget {series.token_budget}"
    num_policies = len(series.timelines)
    figure, panels = _figure(f"{heading}\n{title}", num_policies + 1, 1, size=(9, 2.3 * (num_policies + 1)))
    highest_s = max(timeline.max_s for timeline in series.timelines.values())
    lowest_s = min(min(timeline.gaps_s, default=highest_s) for timeline in series.timelines.values())
    end_s = max(timeline.times_s[-1] for timeline in series.timelines.values() if timeline.times_s)
    for axes, (policy, timeline) in zip(panels, series.timelines.items(), strict=False):
        axes.vlines(timeline.times_s, lowest_s / 2, timeline.gaps_s, color=_POLICY_COLOURS[policy], linewidth=0.6)
        axes.plot(timeline.times_s, timeline.gaps_s, ".", markersize=3, color=_POLICY_COLOURS[policy])
        axes.axhline(timeline.p99_s, color=_BLACK, linestyle="--", linewidth=1)
        axes.annotate(
            f"P99 {_seconds(timeline.p99_s)}", (end_s, timeline.p99_s), (0, 3), textcoords="offset points", ha="right"
        )
        axes.set_title(
            f"{policy}: half of the gaps below {_seconds(timeline.p50_s)}, longest {_seconds(timeline.max_s)}"
        )
        axes.set(ylabel="TBT (s)", yscale="log", ylim=(lowest_s / 2, highest_s * 2), xlim=(0, end_s * 1.01))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    start_s, stall_s = _longest_gap(next(iter(series.timelines.values())).followed_times_s)
    panels[-1].axvspan(start_s, start_s + stall_s, color=_GREY, alpha=0.3, label=f"stall of {_seconds(stall_s)}")
    for policy, timeline in series.timelines.items():
        panels[-1].step(
            timeline.followed_times_s,
            range(1, len(timeline.followed_times_s) + 1),
            where="post",
            color=_POLICY_COLOURS[policy],
            label=policy,
        )
    panels[-1].set(title=f"request {series.followed}: tokens so far", ylabel="output tokens", xlabel="time (s)")
    panels[-1].legend(loc="lower right")
    return figure


def draw_bubbles(series: BubbleSeries, title: str) -> Figure:
    """Draw a timeline of the stages for each policy; what is empty is a bubble."""
    prompts = series.num_prompt_tokens
    heading = (
        f"Pipeline stages and their bubbles: {len(prompts)} requests,"
        f" prompts of {min(prompts)} to {max(prompts)} tokens, budget {series.token_budget}"
    )
    figure, panels = _figure(
        f"{heading}\n{title}", len(series.timelines), 1, size=(11, 1.35 * len(series.timelines) + 1.2), sharex=True
    )
    end_s = max(timeline.duration_s for timeline in series.timelines.values()) + series.arrivals_s[0]
    for axes, (policy, timeline) in zip(panels, series.timelines.items(), strict=True):
        for kind, colour in _KIND_COLOURS.items():
            for stage in range(series.num_stages):
                spans = [
                    (bar.start_s, bar.end_s - bar.start_s)
                    for bar in timeline.bars
                    if bar.stage == stage and bar.kind == kind
                ]
                axes.broken_barh(spans, (stage - 0.4, 0.8), facecolors=colour, edgecolors="white", linewidth=0.3)
        axes.plot(series.arrivals_s, [-0.62] * len(prompts), "v", color=_BLACK, markersize=4, clip_on=False)
        axes.set_title(
            f"{policy}: {timeline.bubble_share:.0%} bubbles, {_seconds(timeline.duration_s)} to the last token",
            loc="left",
        )
        axes.set_yticks(range(series.num_stages), [f"stage {stage}" for stage in range(series.num_stages)])
        axes.set(ylim=(series.num_stages - 0.5, -0.8), xlim=(series.arrivals_s[0], end_s * 1.005))
        axes.grid(visible=False, axis="y")
    panels[-1].set_xlabel("time (s)")
    handles: list[Any] = [Patch(color=colour, label=f"{kind} step") for kind, colour in _KIND_COLOURS.items()]
    handles.append(Patch(facecolor="white", edgecolor=_GREY, label="stage idle"))
    handles += panels[0].plot([], [], "v", color=_BLACK, markersize=4, label="request arrives")
    figure.legend(handles=handles, loc="outside lower center", ncols=len(handles))
    return figure


def draw_capacity_bars(series: CapacityBars, title: str) -> Figure:
    """Draw a group of bars for each target."""
    figure, panels = _figure(
        f"Capacity by policy (in brackets: sarathi's over it), at least {series.num_requests} requests a run\n{title}",
        1,
        len(series.rates),
        size=(10, 4.2),
    )
    for axes, (name, rates) in zip(panels, series.rates.items(), strict=True):
        bars = axes.bar(range(len(rates)), list(rates.values()), color=[_POLICY_COLOURS[policy] for policy in rates])
        best = rates.get("sarathi", 0.0)
        axes.bar_label(
            bars,
            [
                f"{rate:.2f}" if policy == "sarathi" or not rate else f"{rate:.2f}\n({_times(best / rate)})"
                for policy, rate in rates.items()
            ],
            padding=2,
            fontsize=9,
        )
        axes.set_xticks(range(len(rates)), [policy.replace("_", "_\n") for policy in rates])
        axes.set(
            title=f"{name}: P99 TBT within {_seconds(series.tbt_s[name])}, budget {series.token_budgets[name]}",
            ylabel="requests / s",
            ylim=(0, 1.2 * max(*rates.values(), 1e-9)),
        )
        axes.grid(visible=False, axis="x")
    return figure


def draw_capacity_curves(series: CapacityCurves, title: str) -> Figure:
    """Draw a line for each contender."""
    figure, (axes,) = _figure(
        f"Capacity against the target, at least {series.num_requests} requests a run\n{title}", 1, 1, size=(7, 4.4)
    )
    for index, (name, rates) in enumerate(series.rates.items()):
        axes.plot(
            series.tbt_s,
            rates,
            marker=_MARKERS[index],
            color=(_PINK, _RED, _SKY, _BLUE, _GREEN, _ORANGE, _BLACK)[index],
            label=name,
        )
    axes.set(xlabel="target of P99 TBT (s)", ylabel="capacity (requests / s)", xscale="log", ylim=(0, None))
    axes.set_xticks(series.tbt_s, [f"{target:.2g}" for target in series.tbt_s])
    axes.xaxis.set_minor_locator(NullLocator())
    figure.legend(loc="outside lower center", ncols=min(len(series.rates), 3))
    return figure


DRAWINGS: Mapping[str, Callable[[Any, str], Figure]] = {
    "throughput": draw_throughput,
    "operators": draw_operators,
    "linear_layers": draw_linear_layers,
    "chunking": draw_chunking,
    "stalls": draw_stalls,
    "bubbles": draw_bubbles,
    "capacity": draw_capacity_bars,
    "capacity_by_target": draw_capacity_curves,
}
"""By the name of the figure."""


def _figure(
    title: str, num_rows: int, num_columns: int, *, size: tuple[float, float], sharex: bool = False
) -> tuple[Figure, list[Axes]]:
    figure = Figure(figsize=size, layout="constrained")
    panels = figure.subplots(num_rows, num_columns, squeeze=False, sharex=sharex)
    figure.suptitle(title, fontsize=12)
    return figure, list(panels.flat)


def _longest_gap(times_s: Sequence[float]) -> tuple[float, float]:
    return max(
        ((before_s, after_s - before_s) for before_s, after_s in pairwise(times_s)),
        key=lambda gap: gap[1],
        default=(0.0, 0.0),
    )


def _plain_ticks(axes: Axes, values: Sequence[int]) -> None:
    axes.set_xticks(values)
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_locator(NullLocator())


def _times(ratio: float) -> str:
    return f"{ratio:.1f}x" if ratio < 10 else f"{ratio:.0f}x"


def _seconds(value: float) -> str:
    return f"{value:.2f} s" if value >= 1 else f"{1000 * value:.0f} ms"
