"""Write a benchmark's figures to the terminal and, if asked, to a JSON file, with the machine and the date."""

import json
import os
import platform
import sys
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path


def write_report(figures: Mapping[str, float | int | str], *, path: Path | None) -> None:
    """Print `figures`, a line each; write them to `path` as well unless it is None."""
    for name, value in figures.items():
        sys.stdout.write(f"{name}: {value:.4g}\n" if isinstance(value, float) else f"{name}: {value}\n")
    if path is not None:
        report = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "machine": machine(), **figures}
        path.write_text(json.dumps(report, indent=2) + "\n")


def machine() -> str:
    """Describe the processor and how much of it there is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
