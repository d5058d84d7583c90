"""The C++ kernels: built for this machine at first use, or as they were built when the package was installed.

They need no headers of torch, so a build takes two seconds and serves every version of torch. A build for the very
machine is kept in a cache folder, named by the source, the flags and the CPU. Without a compiler the one that pip made
is taken, which any x86-64 CPU with AVX2 runs.
"""

import ctypes
import fcntl
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch  # before the kernels, which then share its pool of threads
from torch import Tensor

_FOLDER = Path(__file__).resolve().parent
_SOURCE = _FOLDER / "csrc" / "cpu.cpp"
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")
_TIMEOUT_S = 120.0
_CPUINFO = Path("/proc/cpuinfo")


_ABI = 4
"""Of the functions and structs in csrc/cpu.cpp, which says the same."""
_TYPES = {"p": ctypes.c_void_p, "i": ctypes.c_int, "l": ctypes.c_int64, "f": ctypes.c_float}
_SIGNATURES = {
    "sarathi_attention": "plppippppliiiiifi",
    "sarathi_write_kv": "plplppiplpliii",
    "sarathi_linear": "pllplpp",
    "sarathi_rms_norm": "pppppllf",
    "sarathi_rotary": "plpplii",
    "sarathi_silu_mul": "ppll",
    "sarathi_draw": "pllpp",
    "sarathi_open_stream": "ii",
    "sarathi_close_stream": "p",
    "sarathi_launch": "pp",
    "sarathi_wait": "pp",
}
"""The types of each kernel's arguments, in order; see csrc/cpu.cpp."""


class NativeBuildError(Exception):
    """There is no build of the C++ kernels that runs here; the message says why."""


@functools.cache
def load_library() -> ctypes.CDLL:
    """Return the kernels, built if need be.

    Raises:
        NativeBuildError: They can neither be built nor found.
    """
    try:
        return _open(_build())
    except (OSError, subprocess.SubprocessError, NativeBuildError) as error:
        why = str(error)
    for installed in sorted(_FOLDER.glob("_cpu*.so")):
        if {"avx2", "fma"} <= _cpu_flags():
            try:
                return _open(installed)
            except (OSError, NativeBuildError) as error:
                why = f"{why}; {error}"
    raise NativeBuildError(f"the C++ kernels cannot be built ({why}), and no build of this version was installed")


def kernels_for(x: Tensor, *, row_size: int = 0) -> ctypes.CDLL | None:
    """Return the kernels if they compute on tensors like this one, on a CPU in float32; None if not.

    None, too, if there is no build that runs here; who chooses the attention backend tells why.

    Args:
        x: What to compute on.
        row_size: Elements of what is computed on in whole vectors of this CPU; 0 for nothing.
    """
    if x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    kernels = _kernels_or_none()
    return kernels if kernels is not None and row_size % kernels.sarathi_lanes() == 0 else None


@functools.cache
def _kernels_or_none() -> ctypes.CDLL | None:
    try:
        return load_library()
    except NativeBuildError:
        return None


def _open(path: Path) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    if not hasattr(library, "sarathi_abi") or library.sarathi_abi() != _ABI:
        raise NativeBuildError(f"{path} was built from another version of the source")
    for name, types in _SIGNATURES.items():
        kernel = getattr(library, name)
        kernel.restype = None
        kernel.argtypes = [_TYPES[letter] for letter in types]
    for name in ("sarathi_lanes", "sarathi_panel"):
        getattr(library, name).restype = ctypes.c_int
    library.sarathi_open_stream.restype = ctypes.c_void_p
    return library


def cache_folder() -> Path:
    """Return where builds are kept: under `XDG_CACHE_HOME`, or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "rayserve_sarathi"


def _build() -> Path:
    """Return the build for this machine, made now unless it is there."""
    compiler = os.environ.get("CXX") or "c++"
    path = shutil.which(compiler)
    if path is None:
        raise NativeBuildError(f"no compiler {compiler!r}")
    marks = (_SOURCE.read_text(), path, *_FLAGS, platform.machine(), *sorted(_cpu_flags()))
    folder = cache_folder()
    library = folder / f"cpu-{hashlib.sha256(chr(0).join(marks).encode()).hexdigest()[:16]}.so"
    if library.is_file():
        return library
    folder.mkdir(parents=True, exist_ok=True)
    # Stages start together: one builds, the others wait.
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not library.is_file():
            _compile(path, library)
    return library


def _compile(compiler: str, library: Path) -> None:
    with tempfile.TemporaryDirectory(dir=library.parent) as folder:
        made = Path(folder) / library.name
        done = subprocess.run(
            [compiler, *_FLAGS, "-o", str(made), str(_SOURCE)],
            capture_output=True,
            text=True,
            timeout=_TIMEOUT_S,
            check=False,
        )
        if done.returncode:
            raise NativeBuildError(f"{compiler} failed: {done.stderr.strip()[-500:]}")
        made.replace(library)


@functools.cache
def _cpu_flags() -> frozenset[str]:
    """Return what this CPU can do, by Linux's names; nothing where that is not told."""
    if not _CPUINFO.is_file():
        return frozenset()
    for line in _CPUINFO.read_text().splitlines():
        if line.startswith("flags"):
            return frozenset(line.partition(":")[2].split())
    return frozenset()
