"""Requests to simulate or to send: how long they are, and when they arrive.

Lengths come from a trace or from lognormal distributions with given medians and 90th percentiles, which is what papers
publish of theirs. Arrivals are drawn with mean gaps of one second and scaled to a rate, so that the same seed gives the
same requests in the same rhythm at any rate, and a search over rates compares like with like.
"""

import csv
import gzip
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal, TextIO

import numpy as np
import numpy.typing as npt

from rayserve_sarathi.errors import ConfigError

Int64Array = npt.NDArray[np.int64]
Float64Array = npt.NDArray[np.float64]

Arrivals = Literal["poisson", "gamma", "recorded"]

_Z90 = 1.2815515655446004
"""The 90th percentile of the standard normal distribution."""
_MAX_DRAWS = 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """Requests in order of arrival.

    Args:
        arrivals_s: When each arrives, ascending, [N].
        num_prompt_tokens: Its prompt, [N], at least 1.
        num_output_tokens: What it generates, [N], at least 1.
        rate: Requests a second on average.
    """

    arrivals_s: Float64Array
    num_prompt_tokens: Int64Array
    num_output_tokens: Int64Array
    rate: float

    def __len__(self) -> int:
        return len(self.arrivals_s)

    def with_lengths_divided(self, divisor: int) -> "Workload":
        """Return the same requests with prompts and outputs of a `divisor`th of their tokens, but at least 1."""
        assert divisor >= 1, divisor
        return replace(
            self,
            num_prompt_tokens=np.maximum(self.num_prompt_tokens // divisor, 1),
            num_output_tokens=np.maximum(self.num_output_tokens // divisor, 1),
        )

    def at_rate(self, rate: float) -> "Workload":
        """Return the same requests at `rate` a second on average."""
        if not 0 < rate < math.inf:
            raise ConfigError(f"a rate is a number of requests a second greater than 0, got {rate}")
        return replace(self, arrivals_s=self.arrivals_s * (self.rate / rate), rate=rate)


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Tokens of requests.

    Args:
        num_prompt_tokens: [N].
        num_output_tokens: [N].
        arrivals_s: When they arrived, ascending, [N]; None if that was not recorded.
    """

    num_prompt_tokens: Int64Array
    num_output_tokens: Int64Array
    arrivals_s: Float64Array | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class LognormalLengths:
    """Prompts and outputs whose logarithms are normal, and independent of each other.

    Args:
        prompt_median: Tokens; half of the prompts have fewer.
        prompt_p90: Tokens; nine of ten prompts have fewer.
        output_median: As `prompt_median`, of the output.
        output_p90: As `prompt_p90`, of the output.

    Raises:
        ConfigError: A 90th percentile is below its median, or a median below 1.
    """

    prompt_median: float
    prompt_p90: float
    output_median: float
    output_p90: float

    def __post_init__(self) -> None:
        for name in ("prompt", "output"):
            median, p90 = getattr(self, f"{name}_median"), getattr(self, f"{name}_p90")
            if not 1 <= median <= p90 < math.inf:
                raise ConfigError(f"{name}_median must be at least 1 and at most {name}_p90, got {median} and {p90}")

    def draw(self, num_requests: int, rng: np.random.Generator) -> Lengths:
        """Return lengths of `num_requests`, rounded, at least 1."""
        return Lengths(
            num_prompt_tokens=_lognormal(self.prompt_median, self.prompt_p90, num_requests, rng),
            num_output_tokens=_lognormal(self.output_median, self.output_p90, num_requests, rng),
        )


ARXIV_LENGTHS = LognormalLengths(prompt_median=7059, prompt_p90=12985, output_median=208, output_p90=371)
"""arxiv_summarization as Sarathi-Serve (OSDI'24, table 2) describes it."""
SHAREGPT_LENGTHS = LognormalLengths(prompt_median=1730, prompt_p90=5696, output_median=415, output_p90=834)
"""openchat_sharegpt4, from the same table."""


def make_workload(
    lengths: Lengths | LognormalLengths,
    *,
    num_requests: int,
    rate: float | None = None,
    arrivals: Arrivals = "poisson",
    arrival_cv: float = 1.0,
    seed: int = 0,
    max_total_tokens: int | None = None,
) -> Workload:
    """Return `num_requests` of the given lengths.

    Args:
        lengths: A trace, from which requests are drawn in random order, all before any comes again; or distributions.
        num_requests: N.
        rate: Requests a second on average. None keeps what was recorded, and is 1 for drawn arrivals.
        arrivals: `poisson`, independent of each other; `gamma`, gaps with the coefficient of variation `arrival_cv`;
            `recorded`, those of the trace, whose order is kept then.
        arrival_cv: See `arrivals`.
        seed: Of everything drawn.
        max_total_tokens: Requests with more in prompt and output together are left out, as those of a shorter context.

    Raises:
        ConfigError: The arguments do not fit together.
    """
    if num_requests < 1:
        raise ConfigError(f"a workload needs at least 1 request, got {num_requests}")
    if seed < 0:
        raise ConfigError(f"seed must be at least 0, got {seed}")
    if not 0 < arrival_cv < math.inf:
        raise ConfigError(f"arrival_cv must be a number greater than 0, got {arrival_cv}")
    length_rng, arrival_rng = (np.random.default_rng([seed, stream]) for stream in range(2))
    if isinstance(lengths, LognormalLengths):
        chosen = _draw_within(lengths, num_requests, length_rng, max_total_tokens)
    else:
        chosen = _choose(lengths, num_requests, length_rng, max_total_tokens, keeps_order=arrivals == "recorded")
    if arrivals == "recorded":
        if chosen.arrivals_s is None:
            raise ConfigError("there are no recorded arrivals; give a trace with arrived_at, or use poisson or gamma")
        arrivals_s = chosen.arrivals_s - chosen.arrivals_s[0]
        unscaled_rate = (num_requests - 1) / arrivals_s[-1] if arrivals_s[-1] else 1.0
    else:
        # Gaps of cv c are gamma with shape 1 / c^2; Poisson arrivals are those of cv 1.
        shape = 1.0 if arrivals == "poisson" else arrival_cv**-2
        arrivals_s = np.cumsum(arrival_rng.gamma(shape, 1 / shape, num_requests))
        unscaled_rate = 1.0
    workload = Workload(
        arrivals_s=arrivals_s,
        num_prompt_tokens=chosen.num_prompt_tokens,
        num_output_tokens=chosen.num_output_tokens,
        rate=float(unscaled_rate),
    )
    return workload if rate is None else workload.at_rate(rate)


def read_trace(path: Path) -> Lengths:
    """Read a CSV file, gzipped if its name ends with .gz.

    Columns are `num_prefill_tokens`, `num_decode_tokens` and perhaps `arrived_at` (seconds); others are ignored. A
    request without output is taken to have generated one token, as the first comes with the prompt.

    Raises:
        ConfigError: There is no such file, a column is missing, or a value is no number of tokens.
    """
    try:
        with _open_text(path) as file:
            rows = list(_parse_rows(csv.DictReader(file), path))
    except OSError as error:
        raise ConfigError(f"cannot read the trace {path}: {error.strerror or error}") from error
    except (EOFError, zlib.error, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(
            f"the trace {path} is broken: {error}; give a CSV file, gzipped if it ends with .gz"
        ) from error
    if not rows:
        raise ConfigError(f"the trace {path} has no requests")
    prompts, outputs, arrivals = zip(*rows, strict=True)
    recorded = None if None in arrivals else np.array(arrivals, dtype=np.float64)
    order = slice(None) if recorded is None else np.argsort(recorded, kind="stable")
    return Lengths(
        num_prompt_tokens=np.array(prompts, dtype=np.int64)[order],
        num_output_tokens=np.array(outputs, dtype=np.int64)[order],
        arrivals_s=None if recorded is None else recorded[order],
    )


def _open_text(path: Path) -> TextIO:
    return gzip.open(path, "rt", newline="") if path.suffix == ".gz" else path.open(newline="")


def _parse_rows(reader: "csv.DictReader[str]", path: Path) -> Iterator[tuple[int, int, float | None]]:
    columns = reader.fieldnames or ()
    for name in ("num_prefill_tokens", "num_decode_tokens"):
        if name not in columns:
            raise ConfigError(f"the trace {path} has no column {name}; its columns are {list(columns)}")
    for row in reader:
        try:
            yield _parse_row(row)
        except (TypeError, ValueError, OverflowError) as error:
            raise ConfigError(f"the trace {path} has no request in line {reader.line_num}: {error}") from error


def _parse_row(row: Mapping[str, str]) -> tuple[int, int, float | None]:
    num_prompt_tokens, num_output_tokens = (int(float(row[f"num_{kind}_tokens"])) for kind in ("prefill", "decode"))
    if num_prompt_tokens < 1 or num_output_tokens < 0:
        raise ValueError(f"{num_prompt_tokens} prompt and {num_output_tokens} output tokens")
    arrived = row.get("arrived_at")
    arrival_s = float(arrived) if arrived else None
    if arrival_s is not None and not math.isfinite(arrival_s):
        raise ValueError(f"arrived_at {arrival_s}")
    return num_prompt_tokens, max(num_output_tokens, 1), arrival_s


def _lognormal(median: float, p90: float, num_requests: int, rng: np.random.Generator) -> Int64Array:
    values = rng.lognormal(math.log(median), math.log(p90 / median) / _Z90, num_requests)
    return np.maximum(np.rint(values), 1).astype(np.int64)


def _draw_within(
    lengths: LognormalLengths, num_requests: int, rng: np.random.Generator, max_total_tokens: int | None
) -> Lengths:
    parts: list[Lengths] = []
    num_missing = num_requests
    for _ in range(_MAX_DRAWS):
        parts.append(_within(lengths.draw(num_missing, rng), max_total_tokens))
        num_missing -= len(parts[-1].num_prompt_tokens)
        if not num_missing:
            return Lengths(
                num_prompt_tokens=np.concatenate([part.num_prompt_tokens for part in parts]),
                num_output_tokens=np.concatenate([part.num_output_tokens for part in parts]),
            )
    raise ConfigError(f"hardly any request of {lengths} has at most max_total_tokens={max_total_tokens}; allow more")


def _choose(
    lengths: Lengths,
    num_requests: int,
    rng: np.random.Generator,
    max_total_tokens: int | None,
    *,
    keeps_order: bool,
) -> Lengths:
    fitting = _within(lengths, max_total_tokens)
    num_there = len(fitting.num_prompt_tokens)
    if not num_there:
        raise ConfigError(f"no request of the trace has at most max_total_tokens={max_total_tokens}; allow more")
    if keeps_order:
        if num_requests > num_there:
            raise ConfigError(f"{num_requests} requests, but {num_there} arrivals were recorded; ask for no more")
        return _take(fitting, np.arange(num_requests))
    orders = [rng.permutation(num_there) for _ in range(-(-num_requests // num_there))]
    return _take(fitting, np.concatenate(orders)[:num_requests])


def _within(lengths: Lengths, max_total_tokens: int | None) -> Lengths:
    if max_total_tokens is None:
        return lengths
    return _take(lengths, np.flatnonzero(lengths.num_prompt_tokens + lengths.num_output_tokens <= max_total_tokens))


def _take(lengths: Lengths, indices: npt.NDArray[np.intp]) -> Lengths:
    return Lengths(
        num_prompt_tokens=lengths.num_prompt_tokens[indices],
        num_output_tokens=lengths.num_output_tokens[indices],
        arrivals_s=None if lengths.arrivals_s is None else lengths.arrivals_s[indices],
    )
