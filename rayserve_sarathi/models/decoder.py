"""The decoder that all families share, or a stage of it: layers [first, last), embedding and head at the ends.

Dimensions: T tokens in the step; D hidden size; V vocabulary; n rows whose logits are wanted.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F  # noqa: N812  torch's own name for it
from torch import Tensor

from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.rms_norm import rms_norm
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.layers import DecoderLayer, RotaryEmbedding, Weights


class Decoder:
    """One stage of a decoder.

    Args:
        config: Of the whole model.
        weights: Those of `stage_parameters`; emptied here.
        layers: The stage's layers.
        backend: How to attend; it owns the layout of the KV cache.
        device: Where the weights are.
        dtype: What they are.
    """

    def __init__(
        self,
        config: DecoderConfig,
        weights: Weights,
        *,
        layers: range,
        backend: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.layers = layers
        self.backend = backend
        self.device = device
        self.dtype = dtype
        self._rotary = RotaryEmbedding(config, device=device)
        self._layers = [DecoderLayer(config, weights, layer=layer, backend=backend) for layer in layers]
        if self.is_last:
            self._norm = weights.pop("norm")
            # Tied embeddings: a single stage has no head of its own.
            self._head = Linear(weights.pop("head") if "head" in weights else weights["embedding"])
        if self.is_first:
            self._embedding = weights.pop("embedding")
        assert not weights, f"weights that no layer took: {sorted(weights)}"

    @property
    def is_first(self) -> bool:
        """Whether this stage has the embedding."""
        return self.layers.start == 0

    @property
    def is_last(self) -> bool:
        """Whether this stage has the final norm and the head."""
        return self.layers.stop == self.config.num_hidden_layers

    def embed(self, token_ids: Tensor) -> Tensor:
        """Return the hidden states, [T, D], of token ids, [T] int64. First stage only."""
        assert self.is_first, self.layers
        return F.embedding(token_ids, self._embedding)

    def forward(
        self, hidden: Tensor, metadata: AttentionMetadata, kv_caches: Sequence[tuple[Tensor, Tensor]]
    ) -> Tensor:
        """Run the stage's layers.

        Args:
            hidden: [T, D], of `embed` or of the stage before.
            metadata: The step.
            kv_caches: Key and value pool of each layer of the stage, in the backend's layout.

        Returns:
            [T, D], for `logits` or for the next stage.
        """
        cos, sin = self._rotary(metadata.positions)
        for layer, (k_cache, v_cache) in zip(self._layers, kv_caches, strict=True):
            hidden = layer(hidden, cos=cos, sin=sin, k_cache=k_cache, v_cache=v_cache, metadata=metadata)
        return hidden

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, [n, V] float32, of hidden states of the last layer, [n, D]. Last stage only."""
        assert self.is_last, self.layers
        return self._head(rms_norm(hidden, self._norm, eps=self.config.rms_norm_eps)).float()
