"""Self-attention of a layer, or a rank's heads of it.

Dimensions: T tokens in the step; R requests; N query and K KV heads of the rank; H head size; D hidden size.
"""

from torch import Tensor

from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.rms_norm import rms_norm
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.parameters import Weights
from rayserve_sarathi.models.shard import Shard


class Attention:
    """Causal self-attention of one layer over the paged KV cache."""

    def __init__(
        self, config: DecoderConfig, weights: Weights, *, layer: int, shard: Shard, backend: AttentionBackend
    ) -> None:
        prefix = f"layers.{layer}."
        self._num_heads = len(shard.heads)
        self._num_kv_heads = len(shard.kv_heads)
        self._head_size = config.head_dim
        self._eps = config.norm_eps
        self.sliding_window = config.sliding_windows[layer]
        self._backend = backend
        self.qkv = Linear(weights.pop(f"{prefix}qkv"), weights.pop(f"{prefix}qkv_bias", None))
        self.o = Linear(weights.pop(f"{prefix}o"), weights.pop(f"{prefix}o_bias", None))
        self.qk_norms = (weights.pop(f"{prefix}q_norm"), weights.pop(f"{prefix}k_norm")) if config.has_qk_norm else None

    def __call__(
        self,
        x: Tensor,
        *,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        last_only: bool,
    ) -> Tensor:
        """Attend from x, [T, D], or with `last_only` from each request's last token; all keys and values are stored.

        Returns:
            What the rank's heads contribute: the sum over all ranks is the layer's attention, [T, D] or [R, D].
        """
        qkv = self.qkv(x).view(len(x), -1, self._head_size)
        if self.qk_norms is not None:
            q_norm, k_norm = self.qk_norms
            num_rotated = self._num_heads + self._num_kv_heads
            qkv[:, : self._num_heads] = rms_norm(qkv[:, : self._num_heads], q_norm, eps=self._eps)
            qkv[:, self._num_heads : num_rotated] = rms_norm(
                qkv[:, self._num_heads : num_rotated], k_norm, eps=self._eps
            )
        q = self._backend.rotate_and_write(qkv, k_cache, v_cache, cos=cos, sin=sin, metadata=metadata)
        if last_only:
            q, metadata = q[metadata.last_rows()], metadata.of_last_tokens()
        out = self._backend.attention(
            q,
            k_cache,
            v_cache,
            metadata=metadata,
            scale=self._head_size**-0.5,
            sliding_window=self.sliding_window,
        )
        return self.o(out.flatten(1))
