"""Settings, as frozen dataclasses that match the keys of a deployment file one to one.

Names are vLLM's where the meaning is the same. `parse` turns the mapping of a file into one of these and names the
nearest valid key for an unknown one.
"""

import difflib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any, ClassVar, Literal, TypeVar, get_type_hints

from pydantic import ConfigDict, TypeAdapter, ValidationError

from rayserve_sarathi.errors import ConfigError

_STRICT = ConfigDict(extra="forbid", strict=True)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What may be in a step, and what may wait."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    policy: str = "sarathi"
    """How to fill a step; see `scheduling.SCHEDULERS`."""
    token_budget: int = 512
    """Most tokens in a step. Decodes are never dropped for it."""
    max_num_seqs: int = 256
    """Most requests that run at once."""
    max_num_partial_prefills: int = 1
    """Most prompts that are half computed at once. 1 computes prompts one after another, as the paper does; a larger
    number splits the prompts' share of the budget evenly, so that a short prompt need not wait for a long one."""
    max_num_waiting: int = 1024
    """Most requests that wait; beyond it a request is refused (429)."""
    watermark: float = 0.01
    """Share of the KV blocks that a new request must leave free, so that decodes can grow."""

    def __post_init__(self) -> None:
        _check_at_least("token_budget", self.token_budget, 1)
        _check_at_least("max_num_seqs", self.max_num_seqs, 1)
        _check_at_least("max_num_partial_prefills", self.max_num_partial_prefills, 1)
        _check_at_least("max_num_waiting", self.max_num_waiting, 1)
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be at least 0 and less than 1, got {self.watermark}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A model and how to run it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: str
    """Local folder or hub id of a Hugging Face checkpoint, or `sarathi-tiny`, the model inside this package."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    tokenizer: str | None = None
    """Local folder or hub id; None takes the model's."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's own chat template."""
    served_model_name: str | None = None
    """What clients call it; None takes `model`."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """`dummy` fills the weights with random numbers from `seed`."""
    dtype: Dtype = "auto"
    """`auto` takes the checkpoint's on a GPU and float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has any."""
    max_model_len: int | None = None
    """Most tokens of a request, prompt and output; None takes the model's own limit."""
    block_size: int = 16
    """Tokens in a KV block."""
    num_gpu_blocks_override: int | None = None
    """KV blocks of each stage; None fills `kv_cache_memory_bytes`."""
    kv_cache_memory_bytes: int | None = None
    """KV memory of each stage; None takes what `gpu_memory_utilization` leaves on a GPU, and on a CPU as much as
    `max_num_seqs` requests of `max_model_len` need but, over all stages, at most a quarter of the free memory."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that a stage may take, for weights, activations and KV cache together."""
    enable_prefix_caching: bool = True
    """Whether requests share the KV of equal beginnings."""
    attention_backend: str = "auto"
    """See `kernels.attention.ATTENTION_BACKENDS`."""
    pipeline_parallel_size: int = 1
    """Stages that share the layers."""
    transport: Literal["compiled_graph", "inline"] = "compiled_graph"
    """How steps reach the stages: Ray compiled graphs between actors, or `inline` on a thread of the scheduler."""
    step_timeout_s: float = 300.0
    """A step that takes longer fails its pipeline; the first ones compile and warm up."""
    seed: int = 0
    """Seed of dummy weights, and of requests that bring none."""
    trust_remote_code: bool = False
    """Whether the tokenizer may run code from the checkpoint. Model code never does."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a local folder, a hub id, or sarathi-tiny")
        for name in ("revision", "tokenizer", "chat_template", "served_model_name"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; leave it out to take the default")
        for name in ("block_size", "pipeline_parallel_size"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("max_model_len", "num_gpu_blocks_override", "kv_cache_memory_bytes"):
            if (value := getattr(self, name)) is not None:
                _check_at_least(name, value, 1)
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be greater than 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "num_gpu_blocks_override and kv_cache_memory_bytes both set the KV cache's size; give one"
            )
        _check_seconds("step_timeout_s", self.step_timeout_s)
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed must be at least 0 and less than 2**63, got {self.seed}")

    @property
    def model_name(self) -> str:
        """What clients call the model."""
        return self.served_model_name or self.model


@dataclass(frozen=True, slots=True, kw_only=True)
class IngressConfig:
    """What the HTTP side accepts."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    api_keys: tuple[str, ...] = ()
    """Keys that clients must show as `Authorization: Bearer ...`; none leaves the server open."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest body of a request."""
    max_prompts_per_request: int = 256
    """Most prompts in one request to `/v1/completions`."""
    max_num_choices: int = 16
    """Largest `n`."""
    request_timeout_s: float = 3600.0
    """A request is cancelled after this long; `x-request-timeout-seconds` may shorten it."""

    def __post_init__(self) -> None:
        if any(not key for key in self.api_keys):
            raise ConfigError("api_keys holds an empty key; remove it or leave api_keys out to open the server")
        for name in ("max_body_bytes", "max_prompts_per_request", "max_num_choices"):
            _check_at_least(name, getattr(self, name), 1)
        _check_seconds("request_timeout_s", self.request_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig(EngineConfig):
    """The `args` of a deployment file: the engine's fields, and the ingress's under `ingress`."""

    ingress: IngressConfig = field(default_factory=IngressConfig)

    @property
    def engine(self) -> EngineConfig:
        """The engine's fields alone: the processes behind the ingress need no API keys."""
        return EngineConfig(**{field.name: getattr(self, field.name) for field in fields(EngineConfig)})


_Config = TypeVar("_Config", SchedulerConfig, EngineConfig, IngressConfig, AppConfig)


def parse(cls: type[_Config], settings: Mapping[str, Any]) -> _Config:
    """Build a configuration from the mapping that a file holds.

    Raises:
        ConfigError: A key is unknown (the message names the nearest valid one), a value has the wrong type or is out
            of range.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(f"settings must be a mapping of names to values, got {settings!r}")
    _refuse_unknown_keys(cls, settings, path="")
    try:
        # By way of JSON, as only there a strict check still takes a mapping for a dataclass and a list for a tuple.
        return TypeAdapter(cls).validate_json(json.dumps(settings, default=str))
    except ValidationError as error:
        problems = [
            f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: {problem['msg'].lower()}"
            + ("" if problem["type"] == "missing" else f", got {problem['input']!r}")
            for problem in error.errors()
        ]
        raise ConfigError("; ".join(problems)) from None


def _refuse_unknown_keys(cls: type, settings: Mapping[str, Any], *, path: str) -> None:
    hints = get_type_hints(cls)
    valid = [field.name for field in fields(cls)]
    for key, value in settings.items():
        if key not in valid:
            nearest = difflib.get_close_matches(str(key), valid, n=1, cutoff=0.5)
            hint = f"did you mean {path}{nearest[0]}?" if nearest else f"use one of {sorted(valid)}"
            raise ConfigError(f"unknown setting {path}{key}; {hint}")
        if is_dataclass(hints[key]) and isinstance(value, Mapping):
            _refuse_unknown_keys(hints[key], value, path=f"{path}{key}.")


def _check_at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def _check_seconds(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number greater than 0, got {value}")
