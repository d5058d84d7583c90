"""The tensors that a rank of a stage needs, by our names, and the checkpoint tensors that each is made of.

Dimensions: N query and K KV heads; G = N / K; H head size; D hidden size; F intermediate size; V vocabulary.
"""

from dataclasses import dataclass

from torch import Tensor

from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.shard import Shard


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorPart:
    """A box of a checkpoint tensor.

    Args:
        name: Of the tensor.
        shape: Of the whole tensor.
        box: Which indices of it, along each dimension.
    """

    name: str
    shape: tuple[int, ...]
    box: tuple[range, ...]

    @property
    def is_whole(self) -> bool:
        """Whether the box is all of the tensor."""
        return tuple(len(side) for side in self.box) == self.shape


@dataclass(frozen=True, slots=True, kw_only=True)
class Parameter:
    """Parts stacked along their first dimension, and rows of zeros after them."""

    parts: tuple[TensorPart, ...]
    num_padding_rows: int = 0


Parameters = dict[str, Parameter]
"""By our names."""
Weights = dict[str, Tensor]
"""Our names of parameters -> tensors. Layers take theirs out, so that a packed weight's original is freed at once."""


def stage_parameters(config: DecoderConfig, layers: range, shard: Shard) -> Parameters:
    """Return a rank's parameters of the stage that holds `layers`.

    The first stage has the embedding, the last one the final norm and the head. With tied embeddings the head is the
    embedding: a single stage has it once, and the last of several has a copy.
    """
    names = config.weight_names
    is_first, is_last = layers.start == 0, layers.stop == config.num_hidden_layers
    parameters: Parameters = {}
    if is_first:
        parameters["embedding"] = _vocab(config, shard, names.embedding)
    for layer in layers:
        parameters |= _layer_parameters(config, shard, layer)
    if is_last:
        parameters |= _norm(config, "norm", names.norm)
    if is_last and not (is_first and config.tie_word_embeddings):
        parameters["head"] = _vocab(config, shard, names.embedding if config.tie_word_embeddings else names.head)
    return parameters


def _vocab(config: DecoderConfig, shard: Shard, name: str) -> Parameter:
    rows = range(min(shard.vocab.start, config.vocab_size), min(shard.vocab.stop, config.vocab_size))
    shape = (config.vocab_size, config.hidden_size)
    return Parameter(parts=(_rows(f"{name}.weight", shape, rows),), num_padding_rows=len(shard.vocab) - len(rows))


def _norm(config: DecoderConfig, ours: str, name: str) -> Parameters:
    shape = (config.hidden_size,)
    parameters = {ours: _whole(f"{name}.weight", shape)}
    if config.norm == "layer_norm":
        parameters[f"{ours}_bias"] = _whole(f"{name}.bias", shape)
    return parameters


def _layer_parameters(config: DecoderConfig, shard: Shard, layer: int) -> Parameters:
    names, head = config.weight_names, config.head_dim
    ours, theirs = f"layers.{layer}.", f"{names.layers}.{layer}."
    heads = range(shard.heads.start * head, shard.heads.stop * head)
    o_shape = (config.hidden_size, config.num_attention_heads * head)
    parameters = {
        **_norm(config, f"{ours}input_norm", f"{theirs}{names.input_norm}"),
        f"{ours}qkv": _qkv(config, shard, theirs, "weight", (config.hidden_size,)),
        f"{ours}o": Parameter(parts=(_columns(f"{theirs}{names.o}.weight", o_shape, heads),)),
        **(_experts if config.mlp == "experts" else _mlp)(config, shard, ours, theirs),
    }
    if config.has_mlp_norm:
        parameters |= _norm(config, f"{ours}mlp_norm", f"{theirs}{names.mlp_norm}")
    if config.has_qkv_bias:
        parameters[f"{ours}qkv_bias"] = _qkv(config, shard, theirs, "bias", ())
    # The ranks' outputs are summed, so one of them adds the bias.
    if config.has_o_bias and shard.tp_rank == 0:
        parameters[f"{ours}o_bias"] = _whole(f"{theirs}{names.o}.bias", (config.hidden_size,))
    if config.has_qk_norm:
        parameters[f"{ours}q_norm"] = _whole(f"{theirs}{names.q_norm}.weight", (head,))
        parameters[f"{ours}k_norm"] = _whole(f"{theirs}{names.k_norm}.weight", (head,))
    return parameters


def _qkv(config: DecoderConfig, shard: Shard, prefix: str, kind: str, row_shape: tuple[int, ...]) -> Parameter:
    """Return the rows of the rank's query heads, then those of its KV heads' keys, then those of their values."""
    num_heads, num_kv_heads, head = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    names = [f"{prefix}{name}.{kind}" for name in config.weight_names.qkv]

    def part(name: str, num_rows: int, first: int, count: int) -> TensorPart:
        """Return `count` heads, of a tensor of `num_rows` heads, from `first` on."""
        return _rows(name, (num_rows * head, *row_shape), range(first * head, (first + count) * head))

    if len(names) == 3:
        counts = (num_heads, num_kv_heads, num_kv_heads)
        parts = [
            part(name, count, its.start, len(its))
            for name, count, its in zip(names, counts, (shard.heads, shard.kv_heads, shard.kv_heads), strict=True)
        ]
        return Parameter(parts=tuple(parts))

    # One tensor: for each KV head, its G query heads, its key and its value.
    (name,) = names
    group = num_heads // num_kv_heads
    total = num_heads + 2 * num_kv_heads
    queries, keys, values = [], [], []
    for kv_head in shard.kv_heads:
        begin = kv_head * (group + 2)
        first = max(shard.heads.start, kv_head * group)
        stop = min(shard.heads.stop, (kv_head + 1) * group)
        queries.append(part(name, total, begin + first - kv_head * group, stop - first))
        keys.append(part(name, total, begin + group, 1))
        values.append(part(name, total, begin + group + 1, 1))
    return Parameter(parts=(*queries, *keys, *values))


def _experts(config: DecoderConfig, shard: Shard, ours: str, theirs: str) -> Parameters:
    names = config.weight_names
    parameters = {
        f"{ours}router": _whole(f"{theirs}{names.router}.weight", (config.num_local_experts, config.hidden_size))
    }
    for expert in range(config.num_local_experts):
        parameters |= _mlp(config, shard, f"{ours}experts.{expert}.", f"{theirs}{names.experts}.{expert}.")
    return parameters


def _mlp(config: DecoderConfig, shard: Shard, ours: str, theirs: str) -> Parameters:
    names, hidden, intermediate = config.weight_names, config.hidden_size, config.intermediate_size
    parameters = {
        f"{ours}up": Parameter(
            parts=tuple(
                _rows(f"{theirs}{name}.weight", (intermediate, hidden), shard.intermediate) for name in names.up
            )
        ),
        f"{ours}down": Parameter(
            parts=(_columns(f"{theirs}{names.down}.weight", (hidden, intermediate), shard.intermediate),)
        ),
    }
    if config.has_mlp_bias:
        parameters[f"{ours}up_bias"] = Parameter(
            parts=tuple(_rows(f"{theirs}{name}.bias", (intermediate,), shard.intermediate) for name in names.up)
        )
        if shard.tp_rank == 0:
            parameters[f"{ours}down_bias"] = _whole(f"{theirs}{names.down}.bias", (hidden,))
    return parameters


def _whole(name: str, shape: tuple[int, ...]) -> Parameter:
    return Parameter(parts=(TensorPart(name=name, shape=shape, box=tuple(map(range, shape))),))


def _rows(name: str, shape: tuple[int, ...], rows: range) -> TensorPart:
    return TensorPart(name=name, shape=shape, box=(rows, *map(range, shape[1:])))


def _columns(name: str, shape: tuple[int, int], columns: range) -> TensorPart:
    return TensorPart(name=name, shape=shape, box=(range(shape[0]), columns))
