"""The decoder that all families share, or a rank of a stage of it: some layers, embedding and head at the ends.

Dimensions: T tokens in the step; R requests; D hidden size; V vocabulary; n rows whose logits are wanted.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.backend import AttentionBackend
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.layers import DenseStage, have_whole_vectors
from rayserve_sarathi.models.config import DecoderConfig
from rayserve_sarathi.models.layers import Layer
from rayserve_sarathi.models.norm import RmsNorm, take_norm
from rayserve_sarathi.models.parallel import TensorParallel
from rayserve_sarathi.models.parameters import Weights
from rayserve_sarathi.models.rotary import RotaryEmbedding
from rayserve_sarathi.models.shard import Shard
from rayserve_sarathi.models.vocabulary import Embedding, Head


class Decoder:
    """One stage of a decoder, or a rank's part of its layers. All ranks make the same calls in the same order.

    Args:
        config: Of the whole model.
        weights: Those of `stage_parameters`; emptied here.
        layers: The stage's layers.
        shard: The rank's part of each.
        tp: The way to the other ranks.
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
        shard: Shard,
        tp: TensorParallel,
        backend: AttentionBackend,
        device: torch.device,
        dtype: torch.dtype,
    ) -> None:
        self.config = config
        self.layers = layers
        self.shard = shard
        self.tp = tp
        self.backend = backend
        self.device = device
        self.dtype = dtype
        self._rotary = RotaryEmbedding(config.rotary, head_size=config.head_dim, device=device)
        self._layers = [Layer(config, weights, layer=layer, shard=shard, tp=tp, backend=backend) for layer in layers]
        if self.is_last:
            self._norm = take_norm(config, weights, "norm")
            # Tied embeddings: a single stage has no head of its own.
            head = weights.pop("head") if "head" in weights else weights["embedding"]
            self._head = Head(head, vocab_size=config.vocab_size, tp=tp)
        if self.is_first:
            self._embedding = Embedding(weights.pop("embedding"), first=shard.vocab.start, tp=tp)
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
        """Return the hidden states, [T, D], of token ids, [T] int32 or int64. First stage only."""
        assert self.is_first, self.layers
        return self._embedding(token_ids)

    def forward(
        self,
        hidden: Tensor,
        metadata: AttentionMetadata,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        *,
        last_only: bool = False,
    ) -> Tensor:
        """Run the stage's layers.

        Args:
            hidden: [T, D], of `embed` or of the stage before.
            metadata: The step.
            kv_caches: Key and value pool of each layer of the stage, in the backend's layout.
            last_only: Whether each request's last token is enough, as on the last stage it is for sampling: the last
                layer then computes no more of the others than their keys and values.

        Returns:
            [T, D], for `logits` or for the next stage; with `last_only` [R, D].
        """
        last_only = last_only and metadata.has_chunks  # without chunks the tokens are the last ones
        cos, sin = self._rotary(metadata.positions)
        addend = None
        for layer, (k_cache, v_cache) in zip(self._layers, kv_caches, strict=True):
            hidden, addend = layer(
                hidden,
                addend,
                cos=cos,
                sin=sin,
                k_cache=k_cache,
                v_cache=v_cache,
                metadata=metadata,
                last_only=last_only and layer is self._layers[-1],
            )
        return hidden if addend is None else hidden + addend

    def join(self, kv_caches: Sequence[tuple[Tensor, Tensor]]) -> DenseStage | None:
        """Return what runs the whole stage in one kernel; None if there is none for such layers."""
        layers = [dense for layer in self._layers if (dense := layer.dense()) is not None]
        if not self.backend.is_in_layers or len(layers) < len(self._layers):
            return None
        if not have_whole_vectors(layers, head_size=self.config.head_dim):
            return None
        norm = self._norm if self.is_last else None
        assert norm is None or isinstance(norm, RmsNorm), "a decoder's norms are of one kind"
        return DenseStage(
            layers,
            kv_caches,
            embedding=self._embedding.weight if self.is_first else None,
            norm=None if norm is None else norm.weight,
            head=self._head.linear if self.is_last else None,
            vocab_size=self.config.vocab_size,
            angles=self._rotary.table,
            num_heads=len(self.shard.heads),
            eps=self.config.norm_eps,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Return the logits, [n, V] float32, of hidden states of the last layer, [n, D]. Last stage only."""
        assert self.is_last, self.layers
        return self._head(self._norm(hidden)).float()
