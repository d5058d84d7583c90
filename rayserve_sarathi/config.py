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

from pydantic import ConfigDict, JsonValue, TypeAdapter, ValidationError

from rayserve_sarathi.errors import ConfigError

DEFAULT_BLOCK_SIZE = 16
"""Tokens in a KV block, unless a deployment says otherwise."""
_STRICT = ConfigDict(extra="forbid", strict=True)

Dtype = Literal["auto", "float32", "bfloat16", "float16"]
TokenBudget = int | Literal["auto"]
PlacementStrategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SchedulerConfig:
    """What may be in a step, and what may wait."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    policy: str = "sarathi"
    """How to fill a step; see `scheduling.SCHEDULERS`."""
    token_budget: TokenBudget = 512
    """Most tokens in a step. Decodes are never dropped for it. `auto` takes, every step, as many as keep `slo.tbt_s`;
    without that target, as many as use the device well. It also lets a very long prompt leave a share to those behind
    it. Policies that take whole prompts have no use for a budget."""
    max_num_batched_tokens: int = 8192
    """Largest budget that `auto` may choose; buffers have room for it."""
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
        if self.token_budget != "auto":
            _check_at_least("token_budget", self.token_budget, 1)
        elif self.policy != "sarathi":
            raise ConfigError(
                f"token_budget auto is for the policy sarathi, and policy is {self.policy}; give a number of tokens"
            )
        _check_at_least("max_num_batched_tokens", self.max_num_batched_tokens, 1)
        _check_at_least("max_num_seqs", self.max_num_seqs, 1)
        _check_at_least("max_num_partial_prefills", self.max_num_partial_prefills, 1)
        _check_at_least("max_num_waiting", self.max_num_waiting, 1)
        if not 0 <= self.watermark < 1:
            raise ConfigError(f"watermark must be at least 0 and less than 1, got {self.watermark}")

    @property
    def max_token_budget(self) -> int:
        """The budget, or the largest that `auto` may choose."""
        return self.max_num_batched_tokens if self.token_budget == "auto" else self.token_budget

    @property
    def max_step_tokens(self) -> int:
        """Tokens that a step has at most: what is sized for it has room for any."""
        return max(self.max_token_budget, self.max_num_seqs)


@dataclass(frozen=True, slots=True, kw_only=True)
class SloConfig:
    """How fast tokens are to follow one another."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    tbt_s: float | None = None
    """Target for the time between two tokens of a request, in seconds; None for no target. Every gap above it is
    counted with its cause, and `token_budget: auto` keeps it."""
    quantile: float = 0.99
    """Share of all gaps that are to be within the target."""

    def __post_init__(self) -> None:
        if self.tbt_s is not None:
            _check_seconds("tbt_s", self.tbt_s)
        if not 0.5 <= self.quantile < 1:
            raise ConfigError(f"quantile must be at least 0.5 and less than 1, got {self.quantile}")


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineConfig:
    """A model and how to run it."""

    __pydantic_config__: ClassVar[ConfigDict] = _STRICT

    model: str
    """Local folder or hub id of a Hugging Face checkpoint, or `sarathi-tiny`, the model inside this package."""
    revision: str | None = None
    """Branch, tag or commit of a hub checkpoint."""
    tokenizer: str | None = None
    """Local folder or hub id, or `sarathi-tiny`; None takes the model's."""
    chat_template: str | None = None
    """Path of a Jinja file that replaces the tokenizer's own chat template."""
    served_model_name: str | None = None
    """What clients call it; None takes `model`."""
    load_format: Literal["auto", "safetensors", "dummy"] = "auto"
    """`dummy` fills the weights with random numbers from `seed`; the folder of `model` then needs only a
    `config.json`."""
    hf_overrides: Mapping[str, JsonValue] = field(default_factory=dict)
    """Values that replace keys of the checkpoint's `config.json`, whole, for instance to try a large model's deployment
    with few layers. A key that neither the file nor its family knows is refused."""
    dtype: Dtype = "auto"
    """`auto` takes the checkpoint's on a GPU and float32 on a CPU."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """`auto` takes GPUs where the cluster has any."""
    max_model_len: int | None = None
    """Most tokens of a request, prompt and output; None takes the model's own limit."""
    block_size: int = DEFAULT_BLOCK_SIZE
    """Tokens in a KV block."""
    num_gpu_blocks_override: int | None = None
    """KV blocks of each stage; None fills `kv_cache_memory_bytes`."""
    kv_cache_memory_bytes: int | None = None
    """KV memory of each rank of each stage; None takes what `gpu_memory_utilization` leaves on a GPU, and on a CPU as
    much as `max_num_seqs` requests of `max_model_len` need but, over all of them, at most a quarter of the free
    memory."""
    gpu_memory_utilization: float = 0.9
    """Share of a GPU's memory that a stage may take, for weights, activations and KV cache together."""
    enable_prefix_caching: bool = True
    """Whether requests share the KV of equal beginnings."""
    attention_backend: str = "auto"
    """See `kernels.attention.ATTENTION_BACKENDS`."""
    async_scheduling: bool = True
    """Whether the step after a short one is made up while that one runs, so that a pipeline of a single stage does not
    wait for the scheduler either."""
    enforce_eager: bool = False
    """Whether a GPU's kernels begin one by one. Otherwise the steps of a stage are CUDA graphs where they can be, which
    take some seconds to record at the start."""
    tensor_parallel_size: int = 1
    """Ranks of a stage that share each of its layers."""
    pipeline_parallel_size: int = 1
    """Stages that share the layers."""
    num_cpus_per_rank: float | None = None
    """CPUs that each rank of a stage reserves; None takes 1 beside a GPU, and a quarter without one, so that a pipeline
    finds place on a laptop. It does not set the number of threads: ranks share the cores of their machine."""
    placement_strategy: PlacementStrategy = "PACK"
    """How the stages of a pipeline spread over nodes. The ranks of a stage always share one. `PACK` takes as few nodes
    as it can and `SPREAD` as many; `STRICT_PACK` insists on one node for all, `STRICT_SPREAD` on one for each stage and
    one more for the scheduler."""
    wait_for_nodes: bool = False
    """Whether to start although the cluster, as it is, could never hold a pipeline: for clusters that add nodes when
    something waits for them, or deploy before their nodes are there, as KubeRay does. Otherwise such a deployment is
    refused. Where no GPU is there yet it needs a `device` that is not `auto`."""
    transport: Literal["auto", "compiled_graph", "socket", "inline"] = "auto"
    """How steps reach the stages: `compiled_graph`, Ray's channels between actors; `socket`, connections of our own
    between actors; `inline`, on a thread of the scheduler. Between GPUs the tensors of both go by NCCL. `auto` takes
    compiled graphs on GPUs that are on one node for certain (`STRICT_PACK`), and sockets otherwise: between nodes Ray's
    may stand still (2.60, ray-project/ray#58426), and on CPUs sockets cost less."""
    step_timeout_s: float = 300.0
    """A step that takes longer fails its pipeline; the first ones compile and warm up."""
    heartbeat_timeout_s: float = 30.0
    """A stage that gives no sign of life for this long is replaced."""
    placement_timeout_s: float = 300.0
    """How long stages may take to find their place, at the start and when one is replaced. A pipeline that has waited
    longer for its place makes requests fail with the reason."""
    load_timeout_s: float = 3600.0
    """How long stages that have their place may take to read their weights, or to fetch them from the hub: at the first
    start hundreds of GB may come over the network."""
    max_rebuilds: int = 5
    """A pipeline that fails more often than this within `rebuild_window_s` is given up: its requests get an error, and
    the process of its scheduler ends."""
    rebuild_window_s: float = 600.0
    """See `max_rebuilds`. A pipeline that does not come back within this time is given up as well."""
    seed: int = 0
    """Seed of dummy weights, and of requests that bring none."""
    trust_remote_code: bool = False
    """Whether the tokenizer may run code from the checkpoint. Model code never does."""
    scheduler: SchedulerConfig = field(default_factory=SchedulerConfig)
    slo: SloConfig = field(default_factory=SloConfig)

    def __post_init__(self) -> None:
        if not self.model:
            raise ConfigError("model is empty; give a local folder, a hub id, or sarathi-tiny")
        for name in ("revision", "tokenizer", "chat_template", "served_model_name"):
            if getattr(self, name) == "":
                raise ConfigError(f"{name} is empty; leave it out to take the default")
        for name in ("block_size", "pipeline_parallel_size", "tensor_parallel_size"):
            _check_at_least(name, getattr(self, name), 1)
        for name in ("max_model_len", "num_gpu_blocks_override", "kv_cache_memory_bytes"):
            if (value := getattr(self, name)) is not None:
                _check_at_least(name, value, 1)
        if self.num_cpus_per_rank is not None and not 0 < self.num_cpus_per_rank < math.inf:
            raise ConfigError(f"num_cpus_per_rank must be a number greater than 0, got {self.num_cpus_per_rank}")
        if not 0 < self.gpu_memory_utilization <= 1:
            raise ConfigError(
                f"gpu_memory_utilization must be greater than 0 and at most 1, got {self.gpu_memory_utilization}"
            )
        if self.num_gpu_blocks_override is not None and self.kv_cache_memory_bytes is not None:
            raise ConfigError(
                "num_gpu_blocks_override and kv_cache_memory_bytes both set the KV cache's size; give one"
            )
        if self.transport == "inline" and self.device == "cuda" and self.tensor_parallel_size > 1:
            raise ConfigError(
                f"tensor_parallel_size={self.tensor_parallel_size} with transport inline runs on CPUs only, its ranks"
                " being threads; use device: cpu, or another transport"
            )
        for name in (
            "step_timeout_s",
            "heartbeat_timeout_s",
            "placement_timeout_s",
            "load_timeout_s",
            "rebuild_window_s",
        ):
            _check_seconds(name, getattr(self, name))
        _check_at_least("max_rebuilds", self.max_rebuilds, 0)
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
    admin_keys: tuple[str, ...] = ()
    """Keys that open every route, and as the only ones those under `/debug`; none leaves `/debug` out."""
    max_body_bytes: int = 4 * 1024 * 1024
    """Largest body of a request."""
    max_prompts_per_request: int = 256
    """Most prompts in one request to `/v1/completions`."""
    max_num_choices: int = 16
    """Largest `n`."""
    request_timeout_s: float = 3600.0
    """A request is cancelled after this long; `x-request-timeout-seconds` may shorten it."""
    pipeline_timeout_s: float = 60.0
    """How long a request waits for a pipeline where none takes it: after a scheduler died, or until one that scales up
    from zero is ready. Then it fails with 503."""

    def __post_init__(self) -> None:
        if any(not key for key in self.api_keys):
            raise ConfigError("api_keys holds an empty key; remove it or leave api_keys out to open the server")
        if any(not key for key in self.admin_keys):
            raise ConfigError("admin_keys holds an empty key; remove it or leave admin_keys out to close /debug")
        for name in ("api_keys", "admin_keys"):
            if any(key != key.strip() for key in getattr(self, name)):
                raise ConfigError(f"{name} holds a key that begins or ends with a space, which no client can send")
        if set(self.api_keys) & set(self.admin_keys):
            raise ConfigError("a key is in both api_keys and admin_keys; an admin key opens every route by itself")
        for name in ("max_body_bytes", "max_prompts_per_request", "max_num_choices"):
            _check_at_least(name, getattr(self, name), 1)
        _check_seconds("request_timeout_s", self.request_timeout_s)
        _check_seconds("pipeline_timeout_s", self.pipeline_timeout_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class AppConfig(EngineConfig):
    """The `args` of a deployment file: the engine's fields, and the ingress's under `ingress`."""

    ingress: IngressConfig = field(default_factory=IngressConfig)

    @property
    def engine(self) -> EngineConfig:
        """The engine's fields alone: the processes behind the ingress need no API keys."""
        return EngineConfig(**{field.name: getattr(self, field.name) for field in fields(EngineConfig)})


_Config = TypeVar("_Config", SchedulerConfig, SloConfig, EngineConfig, IngressConfig, AppConfig)


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
            f"{'.'.join(str(part) for part in problem['loc']) or 'settings'}: {_lower_first(problem['msg'])}"
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


def _lower_first(message: str) -> str:
    return message[:1].lower() + message[1:]


def _check_at_least(name: str, value: int, low: int) -> None:
    if value < low:
        raise ConfigError(f"{name} must be at least {low}, got {value}")


def _check_seconds(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ConfigError(f"{name} must be a number greater than 0, got {value}")
