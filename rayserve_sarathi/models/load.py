"""Load one stage of a model, or a rank's part of it, onto its device."""

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.native import NativeBuildError
from rayserve_sarathi.models.config import DecoderConfig, stage_layers
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.parallel import SINGLE_RANK, TensorParallel
from rayserve_sarathi.models.parameters import Weights, stage_parameters
from rayserve_sarathi.models.resolve import ModelInfo, resolve_folder
from rayserve_sarathi.models.shard import Shard, shard_of
from rayserve_sarathi.models.weights import dummy_weights, load_weights, locate_tensors
from rayserve_sarathi.registry import load

_logger = logging.getLogger(__name__)

# The first that can be had. Of those for GPUs only Triton's, which comes with torch, has been measured by us.
_AUTO_BACKENDS = {
    "cpu": ("cpp", "torch"),
    "cuda": ("triton", "flashinfer", "vllm_flash_attn", "flash_attn", "torch"),
}


def load_decoder(
    config: EngineConfig,
    info: ModelInfo,
    *,
    stage: int,
    tp: TensorParallel = SINGLE_RANK,
    wrap_backend: Callable[[AttentionBackend], AttentionBackend] = lambda backend: backend,
) -> Decoder:
    """Read the weights of a stage, fetching them if the model is a hub id, and build it.

    Args:
        config: Of the engine.
        info: Of the model, by `resolve_model(config)`.
        stage: Which of `config.pipeline_parallel_size` stages.
        tp: Which of `config.tensor_parallel_size` ranks, and the way to the others.
        wrap_backend: Returns what stands between the layers and the attention backend.

    Raises:
        ConfigError: The weights are incomplete or damaged, or this machine lacks the device, or the model cannot be
            split over so many stages or ranks.
    """
    assert tp.tp_size == config.tensor_parallel_size, (tp.tp_size, config.tensor_parallel_size)
    device = resolve_device(config)
    dtype = resolve_dtype(config, info.decoder, device)
    layers = stage_layers(info.decoder.num_hidden_layers, config.pipeline_parallel_size, stage)
    shard = shard_of(info.decoder, tp_rank=tp.tp_rank, tp_size=tp.tp_size)
    backend = wrap_backend(choose_attention_backend(config, info.decoder, device=device, dtype=dtype))

    start_s = time.perf_counter()
    with torch.inference_mode():
        weights = _stage_weights(config, info.decoder, layers, shard, dtype=dtype, device=device)
        loaded_s = time.perf_counter()
        decoder = Decoder(
            info.decoder, weights, layers=layers, shard=shard, tp=tp, backend=backend, device=device, dtype=dtype
        )
    _logger.info(
        "stage %d, rank %d of %d: layers %d to %d of %s in %s on %s, read in %.1f s, laid out in %.1f s",
        stage,
        tp.tp_rank,
        tp.tp_size,
        layers.start,
        layers.stop - 1,
        config.model,
        str(dtype).removeprefix("torch."),
        device,
        loaded_s - start_s,
        time.perf_counter() - loaded_s,
    )
    return decoder


def choose_attention_backend(
    config: EngineConfig, decoder: DecoderConfig, *, device: torch.device, dtype: torch.dtype
) -> AttentionBackend:
    """Return the backend that `config.attention_backend` means; `auto` is the fastest of those that can be had.

    Raises:
        ConfigError: There is no such backend, or it does not attend so.
    """
    names = _AUTO_BACKENDS[device.type] if config.attention_backend == "auto" else (config.attention_backend,)
    refusals: list[str] = []
    for name in names:
        try:
            backend: AttentionBackend = load("attention backend", name, ATTENTION_BACKENDS)()
            reason = backend.refuse(
                block_size=config.block_size, head_size=decoder.head_dim, dtype=dtype, device=device
            )
        except (NativeBuildError, ImportError) as error:
            reason = str(error)
        if reason is None:
            _logger.info("attention backend %s%s", name, "".join(f" ({refusal})" for refusal in refusals))
            return backend
        refusals.append(f"not {name}: {reason}")
    raise ConfigError(f"attention_backend cannot be {config.attention_backend} here, {'; '.join(refusals)}; use auto")


def resolve_device(config: EngineConfig) -> torch.device:
    """Return the device that `config.device` means on this machine.

    Raises:
        ConfigError: It asks for a GPU and there is none.
    """
    has_cuda = torch.cuda.is_available()
    if config.device == "cuda" and not has_cuda:
        raise ConfigError("device is cuda, but torch sees no GPU here; use device: cpu, or a CUDA build of torch")
    return torch.device("cuda", 0) if has_cuda and config.device != "cpu" else torch.device("cpu")


def resolve_dtype(config: EngineConfig, decoder: DecoderConfig, device: torch.device) -> torch.dtype:
    """Return the type of weights, activations and KV: on a CPU `auto` is float32, as 16 bits are emulated there."""
    name = config.dtype
    if name == "auto":
        name = decoder.dtype if device.type == "cuda" else "float32"
    return {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}[name]


def _stage_weights(
    config: EngineConfig,
    decoder: DecoderConfig,
    layers: range,
    shard: Shard,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> Weights:
    if config.load_format == "dummy":
        return dummy_weights(stage_parameters(decoder, layers, shard), seed=config.seed, dtype=dtype, device=device)
    file_of = locate_tensors(resolve_folder(config.model, config.revision, with_weights=True))
    names = decoder.weight_names
    if decoder.tie_word_embeddings and f"{names.head}.weight" in file_of:
        # As in transformers: a head of its own counts for more than the flag, and a head alone is the embedding too.
        if f"{names.embedding}.weight" in file_of:
            decoder = replace(decoder, tie_word_embeddings=False)
        else:
            decoder = replace(decoder, weight_names=replace(names, embedding=names.head))
    parameters = stage_parameters(decoder, layers, shard)
    return load_weights(file_of, parameters, known_names=_KnownNames(decoder), dtype=dtype, device=device)


class _KnownNames:
    """The tensors that a checkpoint of this shape may hold."""

    def __init__(self, decoder: DecoderConfig) -> None:
        everything = stage_parameters(decoder, range(decoder.num_hidden_layers), shard_of(decoder))
        self._names = {part.name for parameter in everything.values() for part in parameter.parts}
        # Some checkpoints with tied embeddings hold them twice.
        self._names.add(f"{decoder.weight_names.head}.weight")

    def __contains__(self, name: object) -> bool:
        # Old checkpoints hold the rotary frequencies, which follow from the config.
        return name in self._names or str(name).endswith("rotary_emb.inv_freq")
