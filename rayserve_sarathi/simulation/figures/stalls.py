"""Gaps between tokens as time goes by: generation stalls of a policy that puts prompts first (paper, section 3.2)."""

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.figures.experiment import Experiment
from rayserve_sarathi.simulation.workload import Float64Array, Workload

POLICIES = ("vllm", "sarathi")


@dataclass(frozen=True, slots=True, kw_only=True)
class GapTimeline:
    """Of one policy.

    Args:
        times_s: When a gap ended; those of several requests that are alike are there once.
        gaps_s: How long it was.
        p50_s: Half of all gaps were shorter.
        p99_s: 99 of 100 were.
        max_s: The longest.
        followed_times_s: When the request that is followed got each of its tokens.
    """

    times_s: tuple[float, ...]
    gaps_s: tuple[float, ...]
    p50_s: float
    p99_s: float
    max_s: float
    followed_times_s: tuple[float, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class StallSeries:
    """The same requests under each policy.

    Args:
        rate: Requests a second.
        num_requests: How many.
        token_budget: Of the policies that keep one.
        followed: Index of the request that had the longest gap under the first policy.
        timelines: By policy.
    """

    rate: float
    num_requests: int
    token_budget: int
    followed: int
    timelines: dict[str, GapTimeline]


def stalls(experiment: Experiment, *, num_requests: int, rate: float, token_budget: int) -> StallSeries:
    """Simulate each of `POLICIES`.

    Raises:
        ConfigError: No request generates two tokens, or as for `Experiment.run`.
    """
    workload = experiment.workload(num_requests, rate)
    if workload.num_output_tokens.max() < 2:
        raise ConfigError("no request generates two tokens, so there is no gap to draw; use another trace")
    times_s = {policy: _token_times_s(experiment, workload, policy, token_budget) for policy in POLICIES}
    first = times_s[POLICIES[0]]
    followed = max(first, key=lambda index: float(np.diff(first[index]).max(initial=0.0)))
    return StallSeries(
        rate=rate,
        num_requests=num_requests,
        token_budget=token_budget,
        followed=followed,
        timelines={policy: _timeline(times, followed) for policy, times in times_s.items()},
    )


def _token_times_s(
    experiment: Experiment, workload: Workload, policy: str, token_budget: int
) -> Mapping[int, Float64Array]:
    return experiment.run(workload, policy, token_budget=token_budget, keeps_token_times=True).token_times_s


def _timeline(token_times_s: Mapping[int, Float64Array], followed: int) -> GapTimeline:
    ends_s = np.concatenate([times_s[1:] for times_s in token_times_s.values()])
    gaps_s = np.concatenate([np.diff(times_s) for times_s in token_times_s.values()])
    points = np.unique(np.stack([ends_s, gaps_s.round(6)], axis=1), axis=0)
    p50_s, p99_s = np.quantile(gaps_s, [0.5, 0.99]).tolist() if len(gaps_s) else (0.0, 0.0)
    return GapTimeline(
        times_s=tuple(points[:, 0].tolist()),
        gaps_s=tuple(points[:, 1].tolist()),
        p50_s=p50_s,
        p99_s=p99_s,
        max_s=float(gaps_s.max(initial=0.0)),
        followed_times_s=tuple(token_times_s[followed].tolist()),
    )
