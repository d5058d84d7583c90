"""Compile each Triton kernel for a GPU of the compute capability that is given, 80 or 90, and fail if one spills."""

import re
import subprocess
import sys
import tempfile

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rayserve_sarathi.kernels import fused, sampling
from rayserve_sarathi.kernels.attention import triton_paged

# Of a thread; `draw` takes 8 on an A100. What spills in a loop over keys takes a hundred and more.
MAX_STACK_BYTES = 16
ATTEND_TYPES = ("*bf16", "*bf16", "*bf16", "*bf16", "*fp32", *["*i32"] * 3, "fp32", *["i32"] * 4)
SPLIT_TYPES = ("*bf16", "*bf16", "*bf16", "*fp32", "*fp32", *["*i32"] * 3, "fp32", *["i32"] * 4)


def attend(*, rows: int, splits: int, requests: int, window: int = 0, group: int = 4) -> dict[str, int]:
    """Return the constants of an attention kernel with heads of 128."""
    return {
        "NUM_KV_HEADS": 8,
        "GROUP": group,
        "HEAD": 128,
        "HEAD_PAD": 128,
        "BLOCK_SIZE": 16,
        "ROWS": rows,
        "QUERIES": rows // group,
        "KEYS": 64,
        "WINDOW": window,
        "SPLITS": splits,
        "REQUESTS": requests,
        "IN_FLOAT32": False,
    }


def kernels(capability: int) -> list[tuple[str, object, tuple[str, ...], dict[str, int], int]]:
    """Return name, kernel, types of the arguments, constants and warps of each."""
    rows, num_warps = (64, 4) if capability >= 90 else (128, 8)
    rotary = {"NUM_HEADS": 32, "NUM_KV_HEADS": 8, "HALF": 64, "HALF_PAD": 64, "HEADS_AT_ONCE": 8}
    return [
        ("chunks", triton_paged._attend, ATTEND_TYPES, attend(rows=rows, splits=1, requests=64), num_warps),
        (
            "chunks with a window",
            triton_paged._attend,
            ATTEND_TYPES,
            attend(rows=rows, splits=1, requests=64, window=4096),
            num_warps,
        ),
        ("decodes", triton_paged._attend, ATTEND_TYPES, attend(rows=16, splits=1, requests=0), 4),
        ("split decodes", triton_paged._attend, SPLIT_TYPES, attend(rows=16, splits=8, requests=0), 4),
        (
            "merge",
            triton_paged._merge,
            ("*fp32", "*fp32", "*bf16"),
            {"HEADS": 32, "HEAD": 128, "HEAD_PAD": 128, "SPLITS": 8},
            2,
        ),
        (
            "rms_norm",
            fused._rms_norm,
            (*["*bf16"] * 5, "fp32"),
            {"SIZE": 4096, "SIZE_PAD": 4096, "HAS_RESIDUAL": True},
            8,
        ),
        ("silu_mul", fused._silu_mul, ("*bf16", "*bf16", "i32"), {"COLUMNS": 1024}, 4),
        ("draw", sampling._draw, ("*fp32", "*fp64", "*i32", "i32", "i32"), {"COLUMNS": 2048}, 8),
        ("rotate_and_write", fused._rotate_and_write, (*["*bf16"] * 3, "*fp32", "*fp32", "*i32"), rotary, 1),
    ]


def resources(binary: bytes) -> tuple[int, int]:
    """Return bytes of stack and registers of each thread of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        command = [triton.knobs.nvidia.cuobjdump.path, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\d+) STACK:(\d+)", text)
    assert found is not None, text
    return int(found[2]), int(found[1])


def main() -> None:
    """Compile all."""
    capability = int(sys.argv[1])
    for name, kernel, types, constants, num_warps in kernels(capability):
        names = kernel.arg_names
        signature = dict(zip(names, (*types, *["constexpr"] * len(constants)), strict=True))
        # As a launch finds them: tensors and strides are multiples of 16.
        aligned = {(place,): [["tt.divisibility", 16]] for place, kind in enumerate(types) if kind != "fp32"}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options={"num_warps": num_warps})
        stack_bytes, registers = resources(made.asm["cubin"])
        sys.stdout.write(
            f"{name}: {registers} registers, {stack_bytes} bytes of stack, {made.metadata.shared} of shared memory\n"
        )
        if stack_bytes > MAX_STACK_BYTES:
            sys.exit(f"{name} spills registers to {stack_bytes} bytes of stack")


if __name__ == "__main__":
    main()
