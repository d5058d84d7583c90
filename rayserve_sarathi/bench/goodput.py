"""Goodput: how many requests a second are answered within targets (the term is DistServe's, OSDI'24)."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields
from itertools import pairwise

from rayserve_sarathi.bench.outcome import Outcome
from rayserve_sarathi.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Targets:
    """What a request must keep to count as good, in seconds; all that are given."""

    ttft_s: float = math.inf
    """Time to the first token."""
    tbt_s: float = math.inf
    """Each of its gaps between two tokens."""
    tpot_s: float = math.inf
    """The mean of its gaps."""
    e2el_s: float = math.inf
    """Time to the last token."""

    def are_met(self, outcome: Outcome) -> bool:
        """Return whether a request is complete and in time."""
        if outcome.failure is not None:
            return False
        times_s = outcome.token_times_s
        gaps_s = [later - earlier for earlier, later in pairwise(times_s)]
        return (
            outcome.ttft_s <= self.ttft_s
            and outcome.e2e_s <= self.e2el_s
            and max(gaps_s, default=0.0) <= self.tbt_s
            and (not gaps_s or sum(gaps_s) / len(gaps_s) <= self.tpot_s)
        )

    def to_json(self) -> dict[str, float]:
        """Return the targets that there are, in milliseconds."""
        values = {field.name.removesuffix("_s"): getattr(self, field.name) for field in fields(self)}
        return {name: 1e3 * value for name, value in values.items() if value < math.inf}


def parse_targets(pairs: Sequence[str]) -> Targets | None:
    """Return the targets of pairs such as `ttft:2000`, in milliseconds; None if there are none.

    Raises:
        ConfigError: A pair is none of these.
    """
    names = [field.name.removesuffix("_s") for field in fields(Targets)]
    targets: dict[str, float] = {}
    for pair in pairs:
        name, _, text = pair.partition(":")
        try:
            value_ms = float(text)
        except ValueError:
            value_ms = math.nan
        if name not in names or not value_ms > 0:
            raise ConfigError(
                f"{pair!r} is no goodput target; use NAME:MILLISECONDS such as tbt:100, NAME being one of {names}"
            )
        targets[f"{name}_s"] = value_ms / 1e3
    return Targets(**targets) if targets else None
