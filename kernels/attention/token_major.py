"""Keys and values as backends for GPUs keep them: in a block one token after the other, each with all its heads.

Dimensions: T tokens in the step; N query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.fused import rotate_and_write


class TokenMajorCache:
    """What such backends have in common; they fill in how to attend, and when not to."""

    is_graphable = False
    is_in_layers = False

    def kv_cache_shape(
        self, *, num_blocks: int, block_size: int, num_kv_heads: int, head_size: int
    ) -> tuple[int, int, int, int]:
        """Return [P, S, K, H]."""
        return (num_blocks, block_size, num_kv_heads, head_size)

    def rotate_and_write(
        self, qkv: Tensor, k_cache: Tensor, v_cache: Tensor, *, cos: Tensor, sin: Tensor, metadata: AttentionMetadata
    ) -> Tensor:
        """Rotate queries and keys, store keys and values; see `AttentionBackend.rotate_and_write`."""
        return rotate_and_write(qkv, k_cache, v_cache, cos=cos, sin=sin, slot_mapping=metadata.slot_mapping)
