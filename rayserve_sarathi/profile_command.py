"""`sarathi profile`: measure how long steps of a model take on this device, for `predict`, `simulate` and `plan`.

The file that it writes has the format of `simulation.profile_files`, and is found by `--profiles FOLDER` of these
commands. The model runs whole on a single rank. Its weights are random, as they make no difference to the time.
"""

import argparse
from pathlib import Path

from rayserve_sarathi.registry import import_object
from rayserve_sarathi.simulation.hardware import HARDWARE


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the command's options."""
    parser.add_argument("--model", required=True, help="folder with a config.json, or a hub id; no weights are read")
    parser.add_argument(
        "--hardware", required=True, choices=sorted(HARDWARE), help="what the present device is, or is to be called"
    )
    parser.add_argument("--folder", type=Path, required=True, metavar="DIR", help="where the profile is written")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"), help="default: %(default)s")
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16", "float16"))
    group = parser.add_argument_group("what to measure")
    group.add_argument("--max-tokens", type=int, default=2048, metavar="N", help="of a chunk (default: %(default)s)")
    group.add_argument("--max-decodes", type=int, default=64, metavar="N", help="of a step (default: %(default)s)")
    group.add_argument(
        "--max-context", type=int, default=4096, metavar="N", help="before a decode or a chunk (default: %(default)s)"
    )
    group.add_argument(
        "--kv-tokens",
        type=int,
        default=32768,
        metavar="N",
        help="of the KV cache; steps that need more are left out (default: %(default)s)",
    )
    group.add_argument(
        "--repeats", type=int, default=5, metavar="N", help="of each step, the median counts (default: %(default)s)"
    )


def run(arguments: argparse.Namespace) -> int:
    """Measure, write the profile and tell how well it predicts; return the exit status.

    Raises:
        ConfigError: An option is out of range, or there is no such model or device.
    """
    # These load torch.
    make_grid = import_object("rayserve_sarathi.profiling.grid:make_grid")
    run_profile = import_object("rayserve_sarathi.profiling.session:run_profile")
    run_profile(
        model=arguments.model,
        hardware=arguments.hardware,
        device=arguments.device,
        dtype=arguments.dtype,
        grid=make_grid(
            max_tokens=arguments.max_tokens,
            max_decodes=arguments.max_decodes,
            max_context=arguments.max_context,
            repeats=arguments.repeats,
        ),
        num_kv_tokens=arguments.kv_tokens,
        folder=arguments.folder,
    )
    return 0
