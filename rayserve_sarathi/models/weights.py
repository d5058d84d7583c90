"""Read a rank's part of the tensors of a stage from safetensors files, some at a time, or make them up.

Nothing else is ever read: `.bin` and `.pt` files are pickles, which may run code.
"""

import hashlib
import threading
from collections.abc import Callable, Container, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.hf_config import read_json
from rayserve_sarathi.models.parameters import Parameters, TensorPart, Weights
from rayserve_sarathi.models.parse import QUANTIZED

_NUM_READERS = 8
"""Files read at a time: from the page cache one got 1.2 GB/s and eight 2.4, on two cores."""
_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# What GPTQ, AWQ and 8-bit checkpoints have in the place of a weight, also where config.json does not say so.
_QUANTIZED = (".qweight", ".qzeros", ".scales", ".g_idx", ".weight_scale", ".weight_scale_inv")
# A checkpoint tensor's parts, and where each goes.
_Targets = list[tuple[TensorPart, Tensor]]
_CONVERT_HINT = (
    "convert it: transformers.AutoModelForCausalLM.from_pretrained(folder).save_pretrained(new_folder)"
    " writes safetensors"
)


def load_weights(
    file_of: Mapping[str, Path],
    parameters: Parameters,
    *,
    known_names: Container[str],
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    """Read a stage's parameters. Beside them, of some files a part of a checkpoint tensor each is in memory at a time.

    Args:
        file_of: The checkpoint's tensors, by `locate_tensors`.
        parameters: What to read.
        known_names: Tensors that the checkpoint may hold; others would be ignored silently, so they are errors.
        dtype: What to convert to.
        device: Where to put them.

    Raises:
        ConfigError: A file is damaged, or a tensor is missing, unknown, quantized or of another shape.
    """
    unknown = sorted(name for name in file_of if name not in known_names)
    if quantized := [name for name in unknown if name.endswith(_QUANTIZED)]:
        raise ConfigError(f"{file_of[quantized[0]]}: tensor {quantized[0]}: {QUANTIZED}")
    if unknown:
        name = unknown[0]
        raise ConfigError(
            f"{file_of[name]}: tensor {name} (and {len(unknown) - 1} more) has no place in this architecture;"
            " check that config.json belongs to these weights"
        )
    weights, targets = _allocate(parameters, dtype=dtype, device=device)
    for name in targets:
        if name not in file_of:
            folder = next(iter(file_of.values())).parent
            raise ConfigError(f"{folder}: no file has tensor {name}; check that config.json belongs to these weights")

    by_file: dict[Path, list[str]] = {}
    for name in targets:
        by_file.setdefault(file_of[name], []).append(name)
    with (
        tqdm(total=len(targets), desc="loading weights", unit="tensor") as progress,
        ThreadPoolExecutor(_NUM_READERS, thread_name_prefix="weights") as readers,
    ):
        lock = threading.Lock()

        def advance() -> None:
            with lock:
                progress.update()

        reading = [
            readers.submit(_read_file, file, {name: targets[name] for name in names}, advance)
            for file, names in by_file.items()
        ]
        try:
            for each in reading:
                each.result()
        finally:
            # After an error, or Ctrl-C, those that have not begun never do.
            readers.shutdown(wait=False, cancel_futures=True)
    return weights


def dummy_weights(parameters: Parameters, *, seed: int, dtype: torch.dtype, device: torch.device) -> Weights:
    """Make up a stage's parameters: norms are 1, the rest normal numbers from (seed, tensor name) alone.

    So a model has equal weights however it is split into stages and ranks: each makes up whole tensors, one at a time,
    and keeps its part.
    """
    weights, targets = _allocate(parameters, dtype=dtype, device=device)
    for name, parts in targets.items():
        shape = parts[0][0].shape
        if len(shape) == 1 and name.endswith(".weight"):
            whole = torch.ones(shape, dtype=dtype, device=device)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "big") >> 1)
            whole = torch.empty(shape, dtype=dtype, device=device).normal_(generator=generator)
            whole.mul_(shape[-1] ** -0.5)
        for part, target in parts:
            target.copy_(whole[_slices(part)])
    return weights


def _allocate(
    parameters: Parameters, *, dtype: torch.dtype, device: torch.device
) -> tuple[Weights, dict[str, _Targets]]:
    """Return empty parameters, and by name of each checkpoint tensor the slices of them where its parts belong."""
    weights: Weights = {}
    targets: dict[str, _Targets] = {}
    for name, parameter in parameters.items():
        rows = [len(part.box[0]) for part in parameter.parts] + [parameter.num_padding_rows]
        shape = (sum(rows), *map(len, parameter.parts[0].box[1:]))
        weights[name] = torch.empty(shape, dtype=dtype, device=device)
        *slices, padding = torch.split(weights[name], rows)
        padding.zero_()
        for part, target in zip(parameter.parts, slices, strict=True):
            targets.setdefault(part.name, []).append((part, target))
    return weights, targets


def _slices(part: TensorPart) -> tuple[slice, ...]:
    return tuple(slice(side.start, side.stop) for side in part.box)


def locate_tensors(root: Path) -> dict[str, Path]:
    """Return which file of a checkpoint's folder has which tensor, from the files' own headers.

    Raises:
        ConfigError: A file is missing or damaged.
    """
    file_of: dict[str, Path] = {}
    for file in _weight_files(root):
        try:
            with safe_open(file, framework="pt") as tensors:
                names = tensors.keys()
        except (OSError, SafetensorError) as error:
            raise ConfigError(f"{file} is damaged or incomplete: {error}; download it again") from None
        if twice := sorted(file_of.keys() & names):
            raise ConfigError(f"{twice[0]} is in {file_of[twice[0]].name} and in {file}; remove the file that is wrong")
        file_of.update(dict.fromkeys(names, file))
    return file_of


def _weight_files(root: Path) -> list[Path]:
    index = root / _INDEX
    if index.is_file():
        # Some folders hold the same weights twice, in another format; the index says which files belong together.
        weight_map = read_json(index).section("weight_map")
        names = sorted(set(weight_map.all_strings().values()))
        if bad := [name for name in names if Path(name).name != name]:
            raise ConfigError(f"{index}: {bad[0]!r} must name a file of the same folder")
        if missing := [name for name in names if not (root / name).is_file()]:
            raise ConfigError(f"{root / missing[0]} is missing, though {_INDEX} lists it; download it again")
        return [root / name for name in names]
    if (single := root / _SINGLE).is_file():
        # What lies beside it is the same weights in another format, or an adapter.
        return [single]
    if files := sorted(root.glob("*.safetensors")):
        return files
    if pickles := sorted(file.name for pattern in ("*.bin", "*.pt", "*.pth") for file in root.glob(pattern)):
        raise ConfigError(f"{root} has weights as pickles only ({pickles[0]}), which may run code; {_CONVERT_HINT}")
    raise ConfigError(
        f"{root} has no *.safetensors file; download the weights, or use load_format: dummy; if the model has its"
        f" weights as .bin or .pt only, {_CONVERT_HINT}"
    )


@torch.inference_mode()
def _read_file(file: Path, targets: Mapping[str, _Targets], advance: Callable[[], object]) -> None:
    try:
        with safe_open(file, framework="pt") as tensors:
            for name, parts in targets.items():
                tensor = tensors.get_slice(name)
                shape, kind = tuple(tensor.get_shape()), tensor.get_dtype()
                expected = parts[0][0].shape
                if shape != expected:
                    raise ConfigError(
                        f"{file}: tensor {name} has shape {list(shape)}, but config.json asks for {list(expected)}"
                    )
                if kind not in ("F32", "F16", "BF16"):
                    raise ConfigError(f"{file}: tensor {name} is {kind}; use a float32, float16 or bfloat16 checkpoint")
                for part, target in parts:
                    if part.is_whole:
                        target.copy_(tensors.get_tensor(name))
                    elif target.numel():
                        target.copy_(tensor[_slices(part)])
                advance()
    except (OSError, SafetensorError) as error:
        raise ConfigError(f"{file} is damaged or incomplete: {error}; download it again") from None
