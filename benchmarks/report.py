"""Write a benchmark's figures to the terminal and, if asked, to a JSON file, with the machine and the date."""

import sys
from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

from rayserve_sarathi.bench.machine import describe_machine
from rayserve_sarathi.simulation.report import write_json

Figure: TypeAlias = "float | int | str | Sequence[Figure] | Mapping[str, Figure]"


def write_report(figures: Mapping[str, Figure], *, path: Path | None) -> None:
    """Print `figures`, a line each; write them to `path` as well unless it is None."""
    sys.stdout.writelines(_lines("", figures))
    if path is not None:
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": describe_machine(), **figures}
        write_json(path, report)


def _lines(name: str, figure: Figure) -> Iterator[str]:
    if isinstance(figure, Mapping):
        for key, inner in figure.items():
            yield from _lines(f"{name}.{key}" if name else key, inner)
    else:
        yield f"{name}: {_text(figure)}\n"


def _text(figure: Figure) -> str:
    if isinstance(figure, float):
        return f"{figure:.4g}"
    if isinstance(figure, Sequence) and not isinstance(figure, str):
        return ", ".join(map(_text, figure))
    return str(figure)
