"""A decoder layer: attention and MLP behind norms and beside a residual, in one of two layouts.

Dimensions: T tokens in the step; R requests; D hidden size.
"""

from torch import Tensor

from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.layers import DenseLayer
from rayserve_sarathi.models.attention import Attention
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.mlp import DenseMlp, take_mlp
from rayserve_sarathi.models.norm import RmsNorm, take_norm
from rayserve_sarathi.models.parallel import TensorParallel
from rayserve_sarathi.models.parameters import Weights
from rayserve_sarathi.models.shard import Shard


class Layer:
    """A decoder layer: attention, then the MLP on what it gave, or both side by side.

    Args:
        config: Of the whole model.
        weights: The layer's are taken out.
        layer: Which, from 0.
        shard: The rank's part.
        tp: The way to the other ranks.
        backend: How to attend.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        *,
        layer: int,
        shard: Shard,
        tp: TensorParallel,
        backend: AttentionBackend,
    ) -> None:
        prefix = f"layers.{layer}."
        self._is_parallel = config.layout == "parallel"
        self._tp = tp
        self._input_norm = take_norm(config, weights, f"{prefix}input_norm")
        self._attention = Attention(config, weights, layer=layer, shard=shard, backend=backend)
        self._mlp_norm = take_norm(config, weights, f"{prefix}mlp_norm") if config.has_mlp_norm else None
        self._mlp = take_mlp(config, weights, prefix)

    def dense(self) -> DenseLayer | None:
        """Return the layer for `kernels.layers`, or None if it is none that those compute."""
        norm, mlp_norm, mlp, attention = self._input_norm, self._mlp_norm, self._mlp, self._attention
        if (
            self._is_parallel
            or self._tp.tp_size > 1
            or not isinstance(norm, RmsNorm)
            or not isinstance(mlp_norm, RmsNorm)
            or not isinstance(mlp, DenseMlp)
            or not mlp.is_gated
            or not attention.qkv.is_packed
        ):
            return None
        return DenseLayer(
            input_norm=norm.weight,
            qkv=attention.qkv,
            qk_norms=attention.qk_norms,
            o=attention.o,
            mlp_norm=mlp_norm.weight,
            up=mlp.up,
            down=mlp.down,
            sliding_window=attention.sliding_window,
        )

    def __call__(
        self,
        hidden: Tensor,
        addend: Tensor | None,
        *,
        cos: Tensor,
        sin: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        metadata: AttentionMetadata,
        last_only: bool,
    ) -> tuple[Tensor, Tensor]:
        """Compute the layer on hidden states, [T, D], the same on all ranks.

        They come and go as two parts whose sum they are, so that a norm can be one kernel with the sum before it.

        Args:
            hidden: The first part.
            addend: The second one; None if there is only one.
            cos: Of the tokens' angles, [T, 1, H / 2]; `sin` likewise.
            k_cache: The layer's key pool; `v_cache` likewise.
            metadata: The step.
            last_only: Whether to go on with each request's last token alone, once keys and values are stored: then
                what is returned is [R, D].
        """
        if addend is None:
            x = self._input_norm(hidden)
        else:
            x, hidden = self._input_norm.add(addend, hidden)
        attention = self._attention(
            x, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache, metadata=metadata, last_only=last_only
        )
        if last_only:
            rows = metadata.last_rows()
            x, hidden = x[rows], hidden[rows]
        if self._is_parallel:
            # The ranks sum both at once (Wang and Komatsuzaki, 2021).
            mlp = self._mlp(x if self._mlp_norm is None else self._mlp_norm(hidden))
            return hidden, self._tp.all_reduce(attention + mlp)
        assert self._mlp_norm is not None, "see DecoderConfig"
        x, hidden = self._mlp_norm.add(self._tp.all_reduce(attention), hidden)
        return hidden, self._tp.all_reduce(self._mlp(x))
