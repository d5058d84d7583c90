"""All layers of a stage in one call to the C++ kernels, for CPUs.

They compute what a layer's own kernels do one after the other, to the same bits, but begin and end a parallel region
once a step and not some ten times a layer, and come back to Python once.

Dimensions: T tokens in the step; R requests; D hidden size; F intermediate size; N query and K KV heads; H head size; P
blocks in the pool; S tokens per block.
"""

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata
from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.native import load_library


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """What a layer multiplies with: attention, then a gated MLP on what it gave, each behind a norm.

    Args:
        input_norm: [D].
        qkv: To [N + 2 K, H], whose heads are rotated whole.
        o: Back from [N, H].
        mlp_norm: [D].
        up: To gate and up side by side, 2 F.
        down: Back from F.
        sliding_window: Tokens that a token sees, itself included; None for all.
    """

    input_norm: Tensor
    qkv: Linear
    o: Linear
    mlp_norm: Tensor
    up: Linear
    down: Linear
    sliding_window: int | None


class _Weights(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "qkv", "qkv_bias", "o", "o_bias")),
        *((name, ctypes.c_void_p) for name in ("mlp_norm", "up", "up_bias", "down", "down_bias", "keys", "values")),
        ("window", ctypes.c_int64),
    )


class _Sizes(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_int64) for name in ("hidden_size", "intermediate_size", "num_heads", "num_kv_heads")),
        *((name, ctypes.c_int64) for name in ("head_size", "block_size")),
        *((name, ctypes.c_float) for name in ("eps", "scale")),
    )


class _Step(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("cos", "sin", "slots", "new_blocks", "cu_query_lens", "seq_lens")),
        ("block_tables", ctypes.c_void_p),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_new_blocks", "num_requests", "table_stride")),
        ("last_only", ctypes.c_int64),
    )


class DenseLayers:
    """Layers whose weights are laid out for the C++ kernels, and whose KV has the layout of `CppAttention`.

    Args:
        layers: At least one, in order.
        num_heads: N.
        num_kv_heads: K.
        head_size: H.
        eps: Of the norms.
    """

    def __init__(
        self, layers: Sequence[DenseLayer], *, num_heads: int, num_kv_heads: int, head_size: int, eps: float
    ) -> None:
        library = load_library()
        self._run = library.sarathi_layers
        self._layers = layers
        self._sizes = _Sizes(
            hidden_size=len(layers[0].input_norm),
            intermediate_size=layers[0].up.num_outputs // 2,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            eps=eps,
            scale=head_size**-0.5,
        )
        self._scratch_each: int = library.sarathi_layers_scratch(ctypes.byref(self._sizes))
        self._scratch = torch.empty(0)
        self._weights = (_Weights * len(layers))(*(_weights_of(layer) for layer in layers))
        self._lanes: int = library.sarathi_lanes()

    @property
    def has_whole_vectors(self) -> bool:
        """Whether the kernels can do it: all sizes are multiples of what they do at once."""
        sizes = (self._sizes.hidden_size, self._sizes.intermediate_size, self._sizes.head_size)
        return all(size % self._lanes == 0 for size in sizes)

    def __call__(
        self,
        hidden: Tensor,
        *,
        cos: Tensor,
        sin: Tensor,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        metadata: AttentionMetadata,
        last_only: bool,
    ) -> Tensor:
        """Compute all layers.

        Args:
            hidden: [T, D] float32.
            cos: Of the tokens' angles, [T, 1, H / 2] float32; `sin` likewise.
            kv_caches: Key and value pool of each layer, [P, K, S, H] float32.
            metadata: The step.
            last_only: Whether each request's last token is enough: the last layer then computes no more of the others
                than their keys and values.

        Returns:
            [T, D], or with `last_only` [R, D].
        """
        hidden = hidden.clone(memory_format=torch.contiguous_format)
        cos, sin = cos.contiguous(), sin.contiguous()
        for weights, (keys, values) in zip(self._weights, kv_caches, strict=True):
            weights.keys, weights.values = keys.data_ptr(), values.data_ptr()
        self._sizes.block_size = kv_caches[0][0].shape[2]
        if self._scratch.numel() < len(hidden) * self._scratch_each:
            # Kept: memory that is new in each step is mapped anew, which takes longer than a decode.
            self._scratch = torch.empty(len(hidden) * self._scratch_each)
        step = _Step(
            cos=cos.data_ptr(),
            sin=sin.data_ptr(),
            slots=metadata.slot_mapping.data_ptr(),
            new_blocks=metadata.new_block_ids.data_ptr(),
            cu_query_lens=metadata.cu_query_lens.data_ptr(),
            seq_lens=metadata.seq_lens.data_ptr(),
            block_tables=metadata.block_tables.data_ptr(),
            num_tokens=len(hidden),
            num_new_blocks=len(metadata.new_block_ids),
            num_requests=len(metadata.seq_lens),
            table_stride=metadata.block_tables.stride(0),
            last_only=last_only,
        )
        out = torch.empty((len(metadata.seq_lens), hidden.shape[1])) if last_only else hidden
        self._run(
            self._weights,
            len(self._layers),
            ctypes.byref(self._sizes),
            ctypes.byref(step),
            hidden.data_ptr(),
            out.data_ptr(),
            self._scratch.data_ptr(),
        )
        return out


def _weights_of(layer: DenseLayer) -> _Weights:
    return _Weights(
        input_norm=layer.input_norm.data_ptr(),
        mlp_norm=layer.mlp_norm.data_ptr(),
        window=layer.sliding_window or 0,
        **{
            field: pointer
            for name, linear in (("qkv", layer.qkv), ("o", layer.o), ("up", layer.up), ("down", layer.down))
            for field, pointer in ((name, linear.panels.data_ptr()), (f"{name}_bias", linear.bias_pointer))
        },
    )
