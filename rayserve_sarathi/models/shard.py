"""Which part of each layer a tensor-parallel rank has (Megatron-LM; Shoeybi et al., 2019)."""

from dataclasses import dataclass

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.config import DecoderConfig


@dataclass(frozen=True, slots=True, kw_only=True)
class Shard:
    """A rank's part of each layer, in numbers of the whole layer.

    Args:
        tp_rank: Whose.
        heads: Query heads.
        kv_heads: The KV heads that they attend to. Where there are more ranks than KV heads, several ranks have the
            same one.
        intermediate: Of the MLP, or of each of its experts.
        vocab: Rows of the embedding and of the head. Equally many for each rank, so those from `vocab_size` on are
            padding.
    """

    tp_rank: int
    heads: range
    kv_heads: range
    intermediate: range
    vocab: range


def shard_of(config: DecoderConfig, *, tp_rank: int = 0, tp_size: int = 1) -> Shard:
    """Return the part of one of `tp_size` ranks.

    Raises:
        ConfigError: The heads or the MLP cannot be split over so many.
    """
    assert 0 <= tp_rank < tp_size, (tp_rank, tp_size)
    num_heads, num_kv_heads = config.num_attention_heads, config.num_key_value_heads
    divisors = [size for size in range(1, num_heads + 1) if _splits_heads(config, size)]
    if tp_size not in divisors:
        raise ConfigError(
            f"{num_heads} attention heads cannot be split over tensor_parallel_size={tp_size}; use one of {divisors}"
        )
    if config.intermediate_size % tp_size:
        both = [size for size in divisors if config.intermediate_size % size == 0]
        raise ConfigError(
            f"an intermediate_size of {config.intermediate_size} cannot be split over tensor_parallel_size={tp_size};"
            f" use one of {both}"
        )
    first_kv_head = tp_rank * num_kv_heads // tp_size
    return Shard(
        tp_rank=tp_rank,
        heads=_part(num_heads, tp_rank, tp_size),
        kv_heads=range(first_kv_head, first_kv_head + max(1, num_kv_heads // tp_size)),
        intermediate=_part(config.intermediate_size, tp_rank, tp_size),
        vocab=_part(config.vocab_size + -config.vocab_size % tp_size, tp_rank, tp_size),
    )


def _splits_heads(config: DecoderConfig, tp_size: int) -> bool:
    """Whether each rank gets as many query heads, and whole KV heads for them."""
    num_kv_heads = config.num_key_value_heads
    return config.num_attention_heads % tp_size == 0 and (num_kv_heads % tp_size == 0 or tp_size % num_kv_heads == 0)


def _part(size: int, tp_rank: int, tp_size: int) -> range:
    share = size // tp_size
    return range(tp_rank * share, (tp_rank + 1) * share)
