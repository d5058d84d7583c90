"""Sizes of published models by name, and what one rank of a stage computes, reads and keeps."""

from collections.abc import Mapping
from dataclasses import dataclass

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.config import DecoderConfig, stage_layers
from rayserve_sarathi.models.hf_config import HfConfig, read_json
from rayserve_sarathi.models.resolve import parse_architecture, resolve_folder
from rayserve_sarathi.models.shard import shard_of
from rayserve_sarathi.simulation.hardware import Hardware
from rayserve_sarathi.simulation.profile_files import LAYER_MATRICES

_RESERVED_BYTES = 10**9


def _llama(
    hidden_size: int,
    intermediate_size: int,
    num_hidden_layers: int,
    num_attention_heads: int,
    vocab_size: int,
    max_position_embeddings: int,
    **others: object,
) -> Mapping[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": hidden_size,
        "intermediate_size": intermediate_size,
        "num_hidden_layers": num_hidden_layers,
        "num_attention_heads": num_attention_heads,
        "num_key_value_heads": 8,
        "vocab_size": vocab_size,
        "max_position_embeddings": max_position_embeddings,
        "torch_dtype": "bfloat16",
        **others,
    }


# The keys of each model's published config.json that decide its time and memory.
_PUBLISHED: dict[str, Mapping[str, object]] = {
    "mistral-7b": _llama(4096, 14336, 32, 32, 32000, 32768, architectures=["MistralForCausalLM"], sliding_window=4096),
    "llama3-8b": _llama(4096, 14336, 32, 32, 128256, 8192),
    "yi-34b": _llama(7168, 20480, 60, 56, 64000, 4096),
    "codellama-34b": _llama(8192, 22016, 48, 64, 32000, 16384),
    "llama2-70b": _llama(8192, 28672, 80, 64, 32000, 4096),
    "falcon-180b": {
        "architectures": ["FalconForCausalLM"],
        "hidden_size": 14848,
        "num_hidden_layers": 80,
        "num_attention_heads": 232,
        "num_kv_heads": 8,
        "vocab_size": 65024,
        "new_decoder_architecture": True,
        "torch_dtype": "bfloat16",
    },
}
MODEL_NAMES = tuple(sorted(_PUBLISHED))


def find_model(name: str) -> DecoderConfig:
    """Return a model's shape.

    Args:
        name: One of `MODEL_NAMES`; or a folder with a `config.json`, or a hub id, which is fetched.

    Raises:
        ConfigError: There is no such model, or its architecture is not known.
    """
    if (values := _PUBLISHED.get(name.lower())) is not None:
        return parse_architecture(HfConfig(values, source=name))[1]
    try:
        folder = resolve_folder(name, None)
    except ConfigError as error:
        raise ConfigError(f"{error}; or use one of {list(MODEL_NAMES)}") from None
    return parse_architecture(read_json(folder / "config.json"))[1]


@dataclass(frozen=True, slots=True, kw_only=True)
class RankShape:
    """What one of `tp_size` ranks has of each layer; all of a token's numbers are of one layer on one rank.

    Args:
        hidden_size: Of the hidden states, which every rank has whole.
        q_size: Query heads of the rank times their size; `kv_size` likewise for its KV heads.
        intermediate_size: The rank's part of the MLP, or of each expert.
        num_up: 2 for a gated MLP, which has two matrices into it.
        vocab_size: The rank's rows of the head.
        num_norms: In a layer.
        num_all_reduces: In a layer: one after attention and one after the MLP, or one for both beside each other.
        num_local_experts: 1 but for mixtures; each token goes through `num_experts_per_tok` of them.
        windows: How many layers of each stage see how many tokens: `(window, layers of each stage)`, where None sees
            everything.
    """

    tp_size: int
    hidden_size: int
    q_size: int
    kv_size: int
    intermediate_size: int
    num_up: int
    vocab_size: int
    num_norms: int
    num_all_reduces: int
    num_local_experts: int
    num_experts_per_tok: int
    windows: tuple[tuple[int | None, tuple[int, ...]], ...]

    @property
    def layers_per_stage(self) -> tuple[int, ...]:
        """Layers of each stage."""
        return tuple(map(sum, zip(*(layers for _, layers in self.windows), strict=True)))

    def matrix(self, operator: str) -> tuple[int, int]:
        """Return the input and output features of a matrix product: qkv, o, up, down (of one expert) or head."""
        match operator:
            case "qkv":
                return self.hidden_size, self.q_size + 2 * self.kv_size
            case "o":
                return self.q_size, self.hidden_size
            case "up":
                return self.hidden_size, self.num_up * self.intermediate_size
            case "down":
                return self.intermediate_size, self.hidden_size
            case "head":
                return self.hidden_size, self.vocab_size
        raise AssertionError(operator)

    def experts_of(self, operator: str) -> tuple[int, int]:
        """Return how many matrices an operator has, and how many of them a token goes through."""
        return (self.num_local_experts, self.num_experts_per_tok) if operator in {"up", "down"} else (1, 1)

    def matrix_flops(self, operator: str) -> int:
        """Return the FLOPs of an operator for a token, all its experts together."""
        num_in, num_out = self.matrix(operator)
        return 2 * num_in * num_out * self.experts_of(operator)[1]

    def elements(self, operator: str) -> int:
        """Return the elements per token of what is no matrix product: norm, rope, activation, add or embedding."""
        match operator:
            case "norm" | "add" | "embedding":
                return self.hidden_size
            case "rope":
                return self.q_size + self.kv_size
            case "activation":
                return self.num_up * self.intermediate_size * self.num_experts_per_tok
        raise AssertionError(operator)

    @property
    def layer_parameters(self) -> int:
        """Weights of a layer, norms and biases left out as they are less than a thousandth."""
        products = ((operator, *self.matrix(operator)) for operator in LAYER_MATRICES)
        return sum(num_in * num_out * self.experts_of(operator)[0] for operator, num_in, num_out in products)

    @property
    def layer_flops(self) -> int:
        """FLOPs of a token in a layer, attention left out."""
        return sum(map(self.matrix_flops, LAYER_MATRICES))

    def stage_parameters(self, stage: int) -> int:
        """Weights of a rank of a stage: the embedding is on the first, the head on the last."""
        layers = self.layers_per_stage
        num_tables = (stage == 0) + (stage == len(layers) - 1)
        return layers[stage] * self.layer_parameters + num_tables * self.hidden_size * self.vocab_size


def rank_shape(decoder: DecoderConfig, *, tensor_parallel_size: int = 1, pipeline_parallel_size: int = 1) -> RankShape:
    """Return what a rank has of a model.

    Raises:
        ConfigError: The model cannot be split so.
    """
    shard = shard_of(decoder, tp_size=tensor_parallel_size)
    stages = [
        decoder.sliding_windows[layers.start : layers.stop]
        for layers in (
            stage_layers(decoder.num_hidden_layers, pipeline_parallel_size, stage)
            for stage in range(pipeline_parallel_size)
        )
    ]
    windows = dict.fromkeys(decoder.sliding_windows)
    return RankShape(
        tp_size=tensor_parallel_size,
        hidden_size=decoder.hidden_size,
        q_size=len(shard.heads) * decoder.head_dim,
        kv_size=len(shard.kv_heads) * decoder.head_dim,
        intermediate_size=len(shard.intermediate),
        num_up=1 if decoder.mlp == "gelu" else 2,
        vocab_size=len(shard.vocab),
        num_norms=2 if decoder.has_mlp_norm else 1,
        num_all_reduces=1 if decoder.layout == "parallel" else 2,
        num_local_experts=decoder.num_local_experts,
        num_experts_per_tok=decoder.num_experts_per_tok,
        windows=tuple((window, tuple(stage.count(window) for stage in stages)) for window in windows),
    )


def usable_bytes(hardware: Hardware, gpu_memory_utilization: float) -> int:
    """Return what a rank has for its weights and KV cache: 1 GB is left for activations and the driver."""
    return int(hardware.memory_bytes * gpu_memory_utilization) - _RESERVED_BYTES


def num_kv_blocks(
    decoder: DecoderConfig,
    hardware: Hardware,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    block_size: int = DEFAULT_BLOCK_SIZE,
    gpu_memory_utilization: float = 0.9,
) -> int:
    """Return how many KV blocks each rank has room for, beside its weights and 1 GB for activations and the driver.

    A pipeline has as many as its fullest stage. With `memory_bytes` of the hardware it is an estimate; the engine
    decides by what is free.

    Raises:
        ConfigError: Not even the weights fit, or the model cannot be split so.
    """
    shape = rank_shape(
        decoder, tensor_parallel_size=tensor_parallel_size, pipeline_parallel_size=pipeline_parallel_size
    )
    usable = usable_bytes(hardware, gpu_memory_utilization)
    counts = []
    for stage, layers in enumerate(shape.layers_per_stage):
        weight_bytes = shape.stage_parameters(stage) * hardware.itemsize
        block_bytes = 2 * layers * shape.kv_size * hardware.itemsize * block_size
        if (num_blocks := (usable - weight_bytes) // block_bytes) < 1:
            raise ConfigError(
                f"a rank of stage {stage} has {weight_bytes / 1e9:.1f} GB of weights, but {hardware.name} leaves"
                f" {usable / 1e9:.1f} GB for them and the KV cache; use more stages or ranks"
            )
        counts.append(num_blocks)
    return min(counts)
