"""Building the C++ kernels: once for a machine, and with a reason where they cannot be."""

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rayserve_sarathi.kernels import native

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler to build with")


def load_in_a_process(cache: Path, **environment: str) -> str:
    """Load the kernels in a new process; return what it prints: an error's text, or nothing."""
    program = """
from rayserve_sarathi.kernels.native import NativeBuildError, load_library
try:
    load_library()
except NativeBuildError as error:
    print(error)
"""
    done = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "XDG_CACHE_HOME": str(cache), **environment},
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout


def test_a_build_is_made_once_by_processes_that_start_together_and_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(load_in_a_process, [tmp_path] * 3)) == ["", "", ""]
    (library,) = native.cache_folder().glob("*.so")
    made_s = library.stat().st_mtime_ns

    assert load_in_a_process(tmp_path) == ""

    assert library.stat().st_mtime_ns == made_s
    assert [path.name for path in native.cache_folder().iterdir() if path != library] == ["lock"]


@pytest.mark.parametrize(
    ("compiler", "reason"), [("no-such-compiler", "no compiler 'no-such-compiler'"), ("false", "/false failed")]
)
def test_without_a_compiler_an_installed_build_is_taken_or_the_reason_told(tmp_path: Path, compiler: str, reason: str):
    told = load_in_a_process(tmp_path, CXX=compiler)

    # In a checkout the installed one may be of a commit before.
    is_old = "was built from another version of the source" in told
    if list(Path(native.__file__).parent.resolve().glob("_cpu*.so")) and not is_old:
        assert told == ""
    else:
        assert reason in told
        assert "no build of this version was installed" in told
