"""Store a step's keys and values in the paged KV cache.

Dimensions: T tokens in the step; K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

from torch import Tensor


def write_kv(
    k: Tensor, v: Tensor, k_cache: Tensor, v_cache: Tensor, *, slot_mapping: Tensor, new_block_ids: Tensor
) -> None:
    """Store this step's keys and values in their slots, in place.

    A block is cleared when its first slot is written. So slots past a request's end hold zeros and not what an earlier
    request left, which may be NaN: a mask does not help against those, as 0 * NaN is NaN.

    Args:
        k: New keys, [T, K, H]; `v` likewise.
        k_cache: Key pool, [P, K, S, H]; `v_cache` likewise.
        slot_mapping: Block id * S + offset of each token, [T] int32.
        new_block_ids: Blocks whose first slot is in `slot_mapping`, int32.
    """
    block_size = k_cache.shape[2]
    slot_mapping = slot_mapping.long()
    slots = (slot_mapping // block_size, slot_mapping % block_size)
    for new, cache in ((k, k_cache), (v, v_cache)):
        cache.index_fill_(0, new_block_ids.long(), 0)
        cache.transpose(1, 2).index_put_(slots, new)
