"""Turn the public profiles of Vidur (MLSys'24, github.com/microsoft/vidur, MIT) into profiles of our format.

They are CSV files, gzipped or not, all in one folder, named after where they were in `data/profiling`:

- `compute_<gpu>_<model>_mlp.csv.gz`: times of a layer's operators by tokens and ranks,
- `a100_attention_64q8kv_tp2_fa_ctx4k.csv.gz`: of attention to 4k tokens, 64 query and 8 KV heads of 128 on two ranks,
- `network_<node>_all_reduce.csv.gz` and `network_<node>_send_recv.csv.gz` (`a40_old_all_reduce.csv.gz` for the A40),
- `a100_cpu_overheads.csv`: CPU times of each step of Sarathi-Serve as it was early in 2024.

Not every model was measured, and attention on one GPU only. What stands for what is in the tables below. By `work`
operators are scaled to the model's shape; attention is scaled to another GPU by the data sheets' bandwidth (decodes)
and FLOP/s (chunks). `ray_comm_time` is part of the CPU time: 0.3 ms for one rank, and 6 ms for several.
"""

import csv
import gzip
import io
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.hardware import Hardware, find_hardware
from rayserve_sarathi.simulation.profile_files import OperatorProfile, Point, make_operator_profile

_ATTENTION_FILE = "a100_attention_64q8kv_tp2_fa_ctx4k.csv"
_CPU_FILE = "a100_cpu_overheads.csv"


@dataclass(frozen=True, slots=True, kw_only=True)
class _Files:
    """Of a kind of hardware: the GPU in the names of compute files, and the files of its node."""

    gpu: str
    all_reduce: str
    send_recv: str


_FILES = {
    "a100": _Files(
        gpu="a100",
        all_reduce="network_a100_pairwise_nvlink_all_reduce.csv",
        send_recv="network_a100_pairwise_nvlink_send_recv.csv",
    ),
    "a100-dgx": _Files(
        gpu="a100", all_reduce="network_a100_dgx_all_reduce.csv", send_recv="network_a100_dgx_send_recv.csv"
    ),
    "a40": _Files(
        gpu="a40", all_reduce="a40_old_all_reduce.csv", send_recv="network_a40_pairwise_nvlink_send_recv.csv"
    ),
    "h100": _Files(
        gpu="h100", all_reduce="network_h100_dgx_all_reduce.csv", send_recv="network_h100_dgx_send_recv.csv"
    ),
}

# Best first: Llama-3-8B has the layers of Mistral-7B, CodeLlama-34B within 1 % the FLOPs of Yi-34B.
_STAND_INS: dict[str, tuple[str, ...]] = {
    "mistral-7b": ("Meta-Llama-3-8B", "Llama-2-7b"),
    "llama3-8b": ("Meta-Llama-3-8B", "Llama-2-7b"),
    "yi-34b": ("CodeLlama-34b",),
    "codellama-34b": ("CodeLlama-34b",),
    "llama2-70b": ("Llama-2-70b",),
    "falcon-180b": ("Llama-2-70b",),
}

# The operators of a layer, and which times are theirs; where there are several, their mean.
_LAYER_TIMES = {
    "norm": ("input_layernorm", "post_attention_layernorm"),
    "qkv": ("attn_pre_proj",),
    "rope": ("attn_rope",),
    "o": ("attn_post_proj",),
    "up": ("mlp_up_proj",),
    "activation": ("mlp_act",),
    "down": ("mlp_down_proj",),
    "add": ("add",),
    "embedding": ("emb",),
}

_HEAD_SIZE = 128

# Whose CPU times to take, by ranks, and the hidden size and vocabulary of its head.
_CPU_MODELS = {
    1: ("meta-llama/Llama-2-7b-hf", 4096, 32000),
    2: ("codellama/CodeLlama-34b-Instruct-hf", 8192, 32000),
    4: ("meta-llama/Llama-2-70b-hf", 8192, 32000),
}


def has_public_profiles(folder: Path) -> bool:
    """Whether a folder has public profiles in it."""
    return _find(folder, _ATTENTION_FILE) is not None


def convert_public_profiles(
    folder: Path, model: str, hardware: Hardware, *, tensor_parallel_size: int
) -> Mapping[str, OperatorProfile]:
    """Return the profile that stands for a model.

    Args:
        folder: Of the public files.
        model: One of `model_shape.MODEL_NAMES`.
        hardware: One that was measured.
        tensor_parallel_size: 1, 2, 4 or 8 ranks.

    Raises:
        ConfigError: It was not measured, or a file is missing or malformed.
    """
    if (files := _FILES.get(hardware.name)) is None:
        raise ConfigError(f"no public profile is of {hardware.name}; use one of {sorted(_FILES)}")
    if (stand_ins := _STAND_INS.get(model.lower())) is None:
        raise ConfigError(f"no public profile stands for {model!r}; use one of {sorted(_STAND_INS)}")
    names = [f"compute_{files.gpu}_{name}_mlp.csv" for name in stand_ins]
    compute = next((name for name in names if _find(folder, name) is not None), None)
    if compute is None:
        raise ConfigError(f"{folder} has none of {names}, which would stand for {model} on {hardware.name}")
    try:
        profile = dict(_convert_layers(folder, compute, tensor_parallel_size))
        profile |= _convert_attention(folder, hardware)
        profile |= _convert_network(folder, files, tensor_parallel_size)
        profile |= _convert_cpu(folder, tensor_parallel_size)
    except (KeyError, ValueError) as error:
        raise ConfigError(f"a public profile in {folder} is malformed: {error!r}") from None
    return profile


def _convert_layers(folder: Path, name: str, tp_size: int) -> Iterator[tuple[str, OperatorProfile]]:
    rows = [row for row in _read(folder, name) if int(row["num_tensor_parallel_workers"]) == tp_size]
    if not rows:
        raise ConfigError(f"{name} has nothing of tensor_parallel_size={tp_size}; use 1, 2, 4 or 8")
    hidden, intermediate = int(rows[0]["n_embd"]), int(rows[0]["n_expanded_embd"])
    num_heads, num_kv_heads = int(rows[0]["n_head"]), int(rows[0]["n_kv_head"])
    q, kv = hidden // tp_size, hidden // num_heads * max(1, num_kv_heads // tp_size)
    num_up = 2 if rows[0]["use_gated_mlp"] == "True" else 1
    work = {
        "norm": hidden,
        "qkv": 2 * hidden * (q + 2 * kv),
        "rope": q + kv,
        "o": 2 * q * hidden,
        "up": 2 * hidden * num_up * intermediate // tp_size,
        "activation": num_up * intermediate // tp_size,
        "down": 2 * hidden * intermediate // tp_size,
        "add": hidden,
        "embedding": hidden,
    }
    for operator, columns in _LAYER_TIMES.items():
        points = (Point(int(row["num_tokens"]), 0, _seconds(row, column)) for row in rows for column in columns)
        yield operator, make_operator_profile(work[operator], points)


def _convert_attention(folder: Path, hardware: Hardware) -> Iterator[tuple[str, OperatorProfile]]:
    measured_on = find_hardware("a100")
    decode_scale = measured_on.memory_bandwidth / hardware.memory_bandwidth
    chunk_scale = measured_on.peak_flops / hardware.peak_flops
    decodes, chunks = [], []
    rows = list(_read(folder, _ATTENTION_FILE))
    for row in rows:
        context_len = int(row["kv_cache_size"])
        # What goes into and out of the kernel has to be laid out for it.
        reshape_s = _seconds(row, "attn_input_reshape") + _seconds(row, "attn_output_reshape")
        if row["is_prefill"] == "True":
            time_s = chunk_scale * (reshape_s + _seconds(row, "attn_prefill"))
            chunks.append(Point(int(row["prefill_chunk_size"]), context_len, time_s))
        else:
            time_s = decode_scale * (reshape_s + _seconds(row, "attn_decode"))
            decodes.append(Point(int(row["batch_size"]), context_len, time_s))
    tp_size = int(rows[0]["num_tensor_parallel_workers"])
    num_heads, num_kv_heads = int(rows[0]["n_q_head"]) // tp_size, int(rows[0]["n_kv_head"]) // tp_size
    yield "decode_attention", make_operator_profile(2 * num_kv_heads * _HEAD_SIZE, decodes)
    yield "chunk_attention", make_operator_profile(4 * num_heads * _HEAD_SIZE, chunks)


def _convert_network(folder: Path, files: _Files, tp_size: int) -> Iterator[tuple[str, OperatorProfile]]:
    all_reduces = [
        Point(int(row["size"]), 0, _seconds(row, "all_reduce"))
        for row in _read(folder, files.all_reduce)
        # All of them in one node.
        if int(row["num_workers"]) == tp_size == int(row["devices_per_node"])
    ]
    if all_reduces:
        yield "all_reduce", make_operator_profile(1, all_reduces)
    rows = list(_read(folder, files.send_recv))
    for operator, devices_per_node in (("send", 2), ("send_between_nodes", 1)):
        points = [
            Point(int(row["size"]), 0, _seconds(row, "send_recv"))
            for row in rows
            if int(row["devices_per_node"]) == devices_per_node
        ]
        yield operator, make_operator_profile(1, points)


def _convert_cpu(folder: Path, tp_size: int) -> Iterator[tuple[str, OperatorProfile]]:
    model, hidden, vocab = _CPU_MODELS[min(tp_size, max(_CPU_MODELS))]
    rows = [row for row in _read(folder, _CPU_FILE) if row["model_name"] == model]

    def profile(work: float, *columns: str) -> OperatorProfile:
        return make_operator_profile(
            work, (Point(int(row["batch_size"]), 0, sum(float(row[c]) for c in columns) / 1e3) for row in rows)
        )

    yield "schedule", profile(1, "schedule_median", "process_model_outputs_median", "ray_comm_time_mean")
    yield "prepare", profile(1, "prepare_inputs_e2e_median")
    yield "sample", profile(2 * hidden * vocab // tp_size, "sampler_e2e_median")


def _seconds(row: Mapping[str, str], operator: str) -> float:
    return float(row[f"time_stats.{operator}.median"]) / 1e3


def _find(folder: Path, name: str) -> Path | None:
    return next((path for path in (folder / name, folder / f"{name}.gz") if path.is_file()), None)


def _read(folder: Path, name: str) -> Iterator[Mapping[str, str]]:
    if (path := _find(folder, name)) is None:
        raise ConfigError(f"{folder} has no {name}, gzipped or not; it is one of the public profiles")
    try:
        content = path.read_bytes()
        text = (gzip.decompress(content) if path.suffix == ".gz" else content).decode()
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} cannot be read: {error}") from None
    yield from csv.DictReader(io.StringIO(text))
