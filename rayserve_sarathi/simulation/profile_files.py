"""Measured operator times in CSV or Parquet files: the format.

A file holds what was measured of one model on one kind of device with one `tensor_parallel_size`, and is named
`<hardware>-<model>-tp<size>.csv` (or `.parquet`), for instance `a100-yi-34b-tp2.csv`. Its columns are

| column      | unit | meaning                                                                        |
|-------------|------|--------------------------------------------------------------------------------|
| operator    |      | see below                                                                      |
| size        |      | tokens, requests or bytes, as the operator has it                              |
| context_len |      | tokens of each request in the KV cache before the step; 0 but for attention    |
| work        |      | what a rank does per unit of size, the same in all rows of an operator         |
| time_us     | us   | on one rank; of one layer where the operator belongs to layers                 |

and its operators are

| operator                       | size     | work                                              |
|--------------------------------|----------|---------------------------------------------------|
| qkv, o, up, down               | tokens   | FLOPs per token                                   |
| norm, rope, activation, add    | tokens   | elements per token; of one norm and of one add    |
| embedding                      | tokens   | elements per token                                |
| decode_attention               | requests | elements of keys and values per context token     |
| chunk_attention                | tokens   | FLOPs per pair of query and key                   |
| all_reduce                     | bytes    | 1; absent with a single rank                      |
| send, send_between_nodes       | bytes    | 1; to the next stage; absent with a single stage  |
| sample                         | requests | FLOPs per token of the head, which is in the time |
| schedule, prepare              | requests | 1; CPU time of a step, see `OperatorTimes`        |

`work` is what makes a profile of one model useful for another of nearly its shape: times are scaled by it.
"""

import csv
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.registry import import_object

COLUMNS = ("operator", "size", "context_len", "work", "time_us")
LAYER_MATRICES = ("qkv", "o", "up", "down")
LAYER_ELEMENTWISE = ("norm", "rope", "activation", "add")
REQUIRED = (
    *LAYER_MATRICES,
    *LAYER_ELEMENTWISE,
    "embedding",
    "decode_attention",
    "chunk_attention",
    "sample",
    "schedule",
    "prepare",
)
OPTIONAL = ("all_reduce", "send", "send_between_nodes")


@dataclass(frozen=True, slots=True)
class Point:
    """One measurement.

    Args:
        size: See the module.
        context_len: Likewise.
        time_s: Seconds.
    """

    size: int
    context_len: int
    time_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorProfile:
    """All measurements of an operator.

    Args:
        work: Of a rank per unit of size.
        points: In order of size, then context; none twice.
    """

    work: float
    points: tuple[Point, ...]


def make_operator_profile(work: float, points: Iterable[Point]) -> OperatorProfile:
    """Return the profile of an operator; of what was measured several times, the mean."""
    seconds: dict[tuple[int, int], list[float]] = {}
    for point in points:
        seconds.setdefault((point.size, point.context_len), []).append(point.time_s)
    return OperatorProfile(
        work=work,
        points=tuple(
            Point(size, context_len, sum(several) / len(several))
            for (size, context_len), several in sorted(seconds.items())
        ),
    )


def read_profile(path: Path) -> Mapping[str, OperatorProfile]:
    """Read a file of the format above; one whose name ends in `.parquet` as Parquet.

    Raises:
        ConfigError: The file cannot be read, or is not of the format; the message names the row.
    """
    works: dict[str, float] = {}
    points: dict[str, list[Point]] = {}
    for where, row in _parquet_rows(path) if path.suffix == ".parquet" else _csv_rows(path):
        operator = row["operator"]
        if operator not in REQUIRED + OPTIONAL:
            raise ConfigError(f"{where}: unknown operator {operator!r}; use one of {sorted(REQUIRED + OPTIONAL)}")
        work, point = _parse(row, where)
        if works.setdefault(operator, work) != work:
            raise ConfigError(f"{where}: work of {operator} is {work}, but {works[operator]} before")
        points.setdefault(operator, []).append(point)
    if missing := [operator for operator in REQUIRED if operator not in points]:
        raise ConfigError(f"{path} has no rows of {missing}; measure them too")
    return {operator: make_operator_profile(works[operator], points[operator]) for operator in points}


def write_profile(path: Path, profile: Mapping[str, OperatorProfile]) -> None:
    """Write a file of the format above."""
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(COLUMNS)
        for operator, measured in profile.items():
            for point in measured.points:
                time_us = f"{point.time_s * 1e6:.4f}"
                writer.writerow([operator, point.size, point.context_len, f"{measured.work:.12g}", time_us])


def _csv_rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield each row of a file with the place where it stands."""
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            _check_columns(path, reader.fieldnames or ())
            for row in reader:
                yield f"{path}, line {reader.line_num}", row
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from None


def _parquet_rows(path: Path) -> Iterator[tuple[str, Mapping[str, str]]]:
    """Yield the same of a Parquet file, whose numbers come as text, too."""
    try:
        read_table = import_object("pyarrow.parquet:read_table")
    except ImportError as error:
        raise ConfigError(f"{path} needs pyarrow; pip install 'rayserve_sarathi[parquet]'") from error
    try:
        table = read_table(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"profile {path} cannot be read: {error}") from None
    _check_columns(path, table.column_names)
    for index, row in enumerate(table.to_pylist()):
        yield f"{path}, row {index + 1}", {column: str(value) for column, value in row.items()}


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    if tuple(columns) != COLUMNS:
        raise ConfigError(f"{path}: the columns must be {list(COLUMNS)}, got {list(columns)}")


def _parse(row: Mapping[str, str], where: str) -> tuple[float, Point]:
    try:
        size, context_len = int(row["size"]), int(row["context_len"])
        work, time_us = float(row["work"]), float(row["time_us"])
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{where}: {error}; size and context_len are whole numbers, the others numbers") from None
    if size < 0 or context_len < 0 or not 0 < work < float("inf") or not 0 <= time_us < float("inf"):
        raise ConfigError(
            f"{where}: size {size}, context_len {context_len} and time_us {time_us} must not be negative, and work"
            f" {work} greater than 0"
        )
    return work, Point(size, context_len, time_us / 1e6)
