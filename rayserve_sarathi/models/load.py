"""Load one stage of a model onto its device."""

import logging
import time
from dataclasses import replace

import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.kernels.attention import ATTENTION_BACKENDS
from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.models.config import DecoderConfig, stage_layers
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.layers import Weights
from rayserve_sarathi.models.parameters import HEAD, stage_parameters
from rayserve_sarathi.models.resolve import ModelInfo, resolve_folder
from rayserve_sarathi.models.weights import dummy_weights, has_tensor, load_weights
from rayserve_sarathi.registry import load

_logger = logging.getLogger(__name__)


def load_decoder(config: EngineConfig, info: ModelInfo, *, stage: int) -> Decoder:
    """Read the weights of a stage, fetching them if the model is a hub id, and build it.

    Args:
        config: Of the engine.
        info: Of the model, by `resolve_model(config)`.
        stage: Which of `config.pipeline_parallel_size` stages.

    Raises:
        ConfigError: The weights are incomplete or damaged, or this machine lacks the device.
    """
    device = resolve_device(config)
    dtype = resolve_dtype(config, info.decoder, device)
    layers = stage_layers(info.decoder.num_hidden_layers, config.pipeline_parallel_size, stage)
    name = "torch" if config.attention_backend == "auto" else config.attention_backend
    backend: AttentionBackend = load("attention backend", name, ATTENTION_BACKENDS)()

    start_s = time.perf_counter()
    with torch.inference_mode():
        weights = _stage_weights(config, info.decoder, layers, dtype=dtype, device=device)
        loaded_s = time.perf_counter()
        decoder = Decoder(info.decoder, weights, layers=layers, backend=backend, device=device, dtype=dtype)
    _logger.info(
        "stage %d: layers %d to %d of %s in %s on %s, read in %.1f s, laid out in %.1f s",
        stage,
        layers.start,
        layers.stop - 1,
        config.model,
        str(dtype).removeprefix("torch."),
        device,
        loaded_s - start_s,
        time.perf_counter() - loaded_s,
    )
    return decoder


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
    config: EngineConfig, decoder: DecoderConfig, layers: range, *, dtype: torch.dtype, device: torch.device
) -> Weights:
    if config.load_format == "dummy":
        return dummy_weights(stage_parameters(decoder, layers), seed=config.seed, dtype=dtype, device=device)
    root = resolve_folder(config.model, config.revision, with_weights=True)
    if decoder.tie_word_embeddings and has_tensor(root, HEAD):
        # As in transformers: a head of its own counts for more than the flag.
        decoder = replace(decoder, tie_word_embeddings=False)
    parameters = stage_parameters(decoder, layers)
    return load_weights(root, parameters, known_names=_KnownNames(decoder), dtype=dtype, device=device)


class _KnownNames:
    """The tensors that a checkpoint of this shape may hold."""

    def __init__(self, decoder: DecoderConfig) -> None:
        everything = stage_parameters(decoder, range(decoder.num_hidden_layers))
        self._names = {spec.name for specs in everything.values() for spec in specs} | {HEAD}

    def __contains__(self, name: object) -> bool:
        # Old checkpoints hold the rotary frequencies, which follow from the config.
        return name in self._names or str(name).endswith("rotary_emb.inv_freq")
