"""Triton's kernels compile for GPUs, with no GPU here: the interpreter does not check types, registers and memory."""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("compile_kernels.py")

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="there is no Triton")


@pytest.mark.parametrize("capability", ["80", "90"])
def test_the_kernels_compile_without_spilling(capability: str) -> None:
    # Another process, as the kernels of this one are interpreted.
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}

    done = subprocess.run(
        [sys.executable, SCRIPT, capability], env=environment, capture_output=True, text=True, check=False
    )

    assert done.returncode == 0, done.stdout + done.stderr
