"""Find a model's folder and what it says about itself, without reading weights: cheap, and free of torch."""

import logging
import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import snapshot_download

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models import MODELS
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.hf_config import HfConfig, read_json
from rayserve_sarathi.models.shard import shard_of
from rayserve_sarathi.registry import load

TINY_MODEL = "sarathi-tiny"
_TINY_FOLDER = Path(__file__).parent / "tiny"

_DESCRIPTION_FILES = ["*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken"]
_WEIGHT_FILES = [*_DESCRIPTION_FILES, "*.safetensors"]
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModelInfo:
    """What there is to know about a model before its weights are read.

    Args:
        root: Local folder of the checkpoint.
        architecture: As in its `config.json`.
        decoder: Its shape.
        max_model_len: Most tokens of a request, prompt and output.
        eos_token_ids: Tokens that end a text, ascending; of `generation_config.json` and `config.json` together.
    """

    root: Path
    architecture: str
    decoder: DecoderConfig
    max_model_len: int
    eos_token_ids: tuple[int, ...]

    @property
    def vocab_size(self) -> int:
        """Number of logits; a token id must be less."""
        return self.decoder.vocab_size


def resolve_model(config: EngineConfig) -> ModelInfo:
    """Find the model's folder, fetching its small files if it is a hub id, and parse its config.

    Raises:
        ConfigError: There is no such model, it is of no known architecture, `max_model_len` exceeds its limit, it
            cannot be split over `tensor_parallel_size` ranks, or `hf_overrides` has a key that changes nothing.
    """
    root = resolve_folder(config.model, config.revision)
    file = read_json(root / "config.json")
    hf = file.overridden(config.hf_overrides)
    architecture, decoder = parse_architecture(hf)
    shard_of(decoder, tp_size=config.tensor_parallel_size)
    max_model_len = config.max_model_len or decoder.max_model_len
    if max_model_len > decoder.max_model_len:
        raise ConfigError(
            f"max_model_len={max_model_len} exceeds the {decoder.max_model_len} positions of {config.model};"
            f" use at most {decoder.max_model_len}"
        )
    eos_token_ids = _eos_token_ids(hf, root / "generation_config.json", decoder.vocab_size)
    hf.check_known(config.hf_overrides, file)
    return ModelInfo(
        root=root,
        architecture=architecture,
        decoder=decoder,
        max_model_len=max_model_len,
        eos_token_ids=eos_token_ids,
    )


def find_tokenizer(config: EngineConfig, info: ModelInfo) -> str:
    """Return the local folder or hub id of the tokenizer."""
    return str(_TINY_FOLDER) if config.tokenizer == TINY_MODEL else config.tokenizer or str(info.root)


def parse_architecture(hf: HfConfig) -> tuple[str, DecoderConfig]:
    """Return the architecture of a `config.json` and the shape that its family reads from it.

    Raises:
        ConfigError: No architecture in it is known, or a value is wrong.
    """
    architectures = hf.strings("architectures")
    known = [name for name in architectures if name in MODELS]
    if not known:
        raise hf.error(f"no architecture in {list(architectures)} is supported; use one of {sorted(MODELS)}")
    decoder: DecoderConfig = load("architecture", known[0], MODELS)(hf)
    return known[0], decoder


def resolve_folder(model: str, revision: str | None, *, with_weights: bool = False) -> Path:
    """Return the local folder of a checkpoint; files of a hub id are fetched into the Hugging Face cache.

    Raises:
        ConfigError: There is no such folder, or the hub does not have it.
    """
    if model == TINY_MODEL:
        return _TINY_FOLDER
    try:
        folder = Path(model).expanduser()
        is_folder = folder.is_dir()
    except (OSError, RuntimeError) as error:  # a name that is too long, or the home of a user who does not exist
        raise ConfigError(f"model {model[:200]!r} is no path: {error}") from None
    if is_folder:
        return folder
    if not _HUB_ID.fullmatch(model) or ".." in model:
        raise ConfigError(
            f"model {model!r} is neither a folder nor a hub id such as mistralai/Mistral-7B-v0.1;"
            f" check the path, or use {TINY_MODEL}"
        )
    patterns = _WEIGHT_FILES if with_weights else _DESCRIPTION_FILES
    _logger.info("fetching %s from the hub", model)
    try:
        return Path(snapshot_download(model, revision=revision, allow_patterns=patterns))
    except (OSError, ValueError) as error:
        # The hub's own errors are of these two types; their first line says what happened.
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(
            f"model {model!r} is no folder here and could not be fetched from the hub ({reason});"
            f" check the name and HF_TOKEN, or download it and give its folder"
        ) from error


def _eos_token_ids(hf: HfConfig, generation_config: Path, vocab_size: int) -> tuple[int, ...]:
    ids = set(hf.token_ids("eos_token_id"))
    if generation_config.is_file():
        ids.update(read_json(generation_config).token_ids("eos_token_id"))
    # Some checkpoints name ids of a larger tokenizer; no logit stands for those.
    return tuple(sorted(token_id for token_id in ids if token_id < vocab_size))
