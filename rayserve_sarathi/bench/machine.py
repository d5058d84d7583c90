"""What a measurement ran on."""

import os
import platform
from pathlib import Path


def describe_machine() -> str:
    """Name the processor and how much of it there is."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    model = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
    return f"{model or platform.processor()}, {len(os.sched_getaffinity(0))} cores, Python {platform.python_version()}"
