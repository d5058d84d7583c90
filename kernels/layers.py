"""A step of a stage in one call to the C++ kernels, for CPUs: embedding, all layers, norm and head.

They compute what each one's own kernels do one after the other, to the same bits, but begin and end a parallel region
once a step and not some ten times a layer, and come back to Python once.

Dimensions: T tokens in the step; R requests, W of them wanted; D hidden size; V vocabulary; F intermediate size; N
query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayserve_sarathi.kernels.linear import Linear
from rayserve_sarathi.kernels.native import load_library

Int32Array = npt.NDArray[np.int32]

_NO_FAULT, _UNKNOWN_TOKEN, _WRONG_LENGTHS = range(3)
"""What is wrong with a step; as in csrc/cpu.cpp."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DenseLayer:
    """What a layer multiplies with: attention, then a gated MLP on what it gave, each behind a norm.

    Args:
        input_norm: [D].
        qkv: To [N + 2 K, H], whose heads are rotated whole.
        qk_norms: Norms of the heads of queries and of keys, before they are rotated, [H] each; None for none.
        o: Back from [N, H].
        mlp_norm: [D].
        up: To gate and up side by side, 2 F.
        down: Back from F.
        sliding_window: Tokens that a token sees, itself included; None for all.
    """

    input_norm: Tensor
    qkv: Linear
    qk_norms: tuple[Tensor, Tensor] | None
    o: Linear
    mlp_norm: Tensor
    up: Linear
    down: Linear
    sliding_window: int | None


class _Weights(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("input_norm", "qkv", "qkv_bias", "q_norm", "k_norm", "o", "o_bias")),
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
        *((name, ctypes.c_void_p) for name in ("token_ids", "query_lens", "context_lens", "num_blocks", "wanted")),
        *((name, ctypes.c_void_p) for name in ("block_tables", "hidden", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_requests", "num_wanted", "num_block_ids")),
    )


class _Vocabulary(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head")),
        ("size", ctypes.c_int64),
    )


_LONG = ("token_ids", "block_tables")


class StepArrays(NamedTuple):
    """A step as `StepInput` describes it.

    Args:
        token_ids: [T]; none is pending.
        query_lens: [R].
        context_lens: [R].
        num_blocks: [R].
        wanted: Requests with whose last token alone the last layer goes on, once it has stored keys and values, [W].
        block_tables: Block ids of each request's context and chunk, concatenated.
    """

    token_ids: Int32Array
    query_lens: Int32Array
    context_lens: Int32Array
    num_blocks: Int32Array
    wanted: Int32Array
    block_tables: Int32Array


class DenseStage:
    """A stage whose weights are laid out for the C++ kernels, and whose KV has the layout of `CppAttention`.

    Args:
        layers: At least one, in order.
        kv_caches: Key and value pool of each, [P, K, S, H] float32.
        embedding: [V, D] float32; None behind the first stage.
        norm: The one before the head, [D]; None before the last stage.
        head: To V or more outputs; None likewise.
        vocab_size: V.
        angles: Returns cosine and sine of the angles of so many positions, or more, [positions, 1, H / 2] float32 each.
        num_heads: N.
        eps: Of the norms.
    """

    def __init__(
        self,
        layers: Sequence[DenseLayer],
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        *,
        embedding: Tensor | None,
        norm: Tensor | None,
        head: Linear | None,
        vocab_size: int,
        angles: Callable[[int], tuple[Tensor, Tensor]],
        num_heads: int,
        eps: float,
    ) -> None:
        library = load_library()
        self._run = library.sarathi_layers
        self._kept = (layers, kv_caches, embedding, norm, head)  # as pointers keep nothing
        _, num_kv_heads, block_size, head_size = kv_caches[0][0].shape
        self._hidden_size = len(layers[0].input_norm)
        self._vocab_size = vocab_size
        self._angles = angles
        self._sizes = _Sizes(
            hidden_size=self._hidden_size,
            intermediate_size=layers[0].up.num_outputs // 2,
            num_heads=num_heads,
            num_kv_heads=num_kv_heads,
            head_size=head_size,
            block_size=block_size,
            eps=eps,
            scale=head_size**-0.5,
        )
        self._weights = (_Weights * len(layers))(
            *(_weights_of(layer, *pools) for layer, pools in zip(layers, kv_caches, strict=True))
        )
        first = None if embedding is None else embedding.data_ptr()
        self._without_head = _Vocabulary(embedding=first, size=vocab_size)
        self._with_head: _Vocabulary | None = None
        if norm is not None and head is not None:
            self._with_head = _Vocabulary(
                embedding=first, norm=norm.data_ptr(), head=head.panels.data_ptr(), size=vocab_size
            )
        self._scratch_each: int = library.sarathi_layers_scratch(ctypes.byref(self._sizes))
        self._scratch = torch.empty(0)

    def hidden(self, step: StepArrays, hidden: Tensor | None, *, last_only: bool) -> Tensor:
        """Compute all layers.

        Args:
            step: What to compute.
            hidden: Of the stage before, [T, D] float32; None for the embedding of the tokens.
            last_only: Whether the last layer is to go on with what is wanted alone.

        Returns:
            [T, D] float32, or with `last_only` [W, D].

        Raises:
            IndexError: A token is not in the vocabulary, or the arrays' lengths do not fit each other.
        """
        out = torch.empty((len(step.wanted) if last_only else len(step.token_ids), self._hidden_size))
        self._compute(self._without_head, step, hidden, last_only=last_only, out=out, likeliest=None)
        return out

    def logits(self, step: StepArrays, hidden: Tensor | None) -> tuple[Tensor, Int32Array]:
        """Compute all layers, norm and head, where there is one; see `hidden`.

        Returns:
            Logits of what is wanted, [W, V] float32, and the first of the largest ones of each, or -1 where that is not
            finite, as where any is NaN, [W].
        """
        assert self._with_head is not None, "it is not the last stage"
        out = torch.empty((len(step.wanted), self._vocab_size))
        likeliest = np.empty(len(step.wanted), dtype=np.int32)
        self._compute(self._with_head, step, hidden, last_only=True, out=out, likeliest=likeliest)
        return out, likeliest

    def _compute(
        self,
        vocabulary: _Vocabulary,
        step: StepArrays,
        hidden: Tensor | None,
        *,
        last_only: bool,
        out: Tensor,
        likeliest: Int32Array | None,
    ) -> None:
        if hidden is None:
            assert vocabulary.embedding is not None, "it is not the first stage"
        else:
            assert (hidden.device.type, hidden.dtype) == ("cpu", torch.float32), f"{hidden.device} {hidden.dtype}"
            assert hidden.shape == (len(step.token_ids), self._hidden_size), f"hidden states of {hidden.shape}"
            hidden = hidden.contiguous()
        num_scratch = len(step.token_ids) * self._scratch_each
        if self._scratch.numel() < num_scratch:
            # Kept: memory that is new in each step is mapped anew, which takes longer than a decode.
            self._scratch = torch.empty(num_scratch)
        cos, sin = self._angles(int((step.context_lens + step.query_lens).max()))
        packed = np.concatenate(step, dtype=np.int32)
        *starts, _ = accumulate((4 * len(array) for array in step), initial=packed.ctypes.data)
        token_ids, query_lens, context_lens, num_blocks, wanted, block_tables = starts
        fault = self._run(
            self._weights,
            len(self._weights),
            ctypes.byref(self._sizes),
            ctypes.byref(vocabulary),
            ctypes.byref(
                _Step(
                    token_ids=token_ids,
                    query_lens=query_lens,
                    context_lens=context_lens,
                    num_blocks=num_blocks,
                    wanted=wanted if last_only else None,
                    block_tables=block_tables,
                    hidden=None if hidden is None else hidden.data_ptr(),
                    cos=cos.data_ptr(),
                    sin=sin.data_ptr(),
                    num_tokens=len(step.token_ids),
                    num_requests=len(step.query_lens),
                    num_wanted=len(step.wanted),
                    num_block_ids=len(step.block_tables),
                )
            ),
            self._scratch.data_ptr(),
            out.data_ptr(),
            None if likeliest is None else likeliest.ctypes.data,
        )
        if fault == _UNKNOWN_TOKEN:
            raise IndexError(f"tokens {step.token_ids.tolist()} with a vocabulary of {self._vocab_size}")
        if fault == _WRONG_LENGTHS:
            lens = {name: array.tolist() for name, array in step._asdict().items() if name not in _LONG}
            raise IndexError(f"{len(step.token_ids)} tokens and {len(step.block_tables)} block ids do not fit {lens}")
        assert fault == _NO_FAULT, f"{fault} is none of the kernel's faults"


def have_whole_vectors(layers: Sequence[DenseLayer], *, head_size: int) -> bool:
    """Return whether `DenseStage` can compute them: all sizes are multiples of what its kernels do at once."""
    library = load_library()
    lanes: int = library.sarathi_lanes()
    panel: int = library.sarathi_panel()
    is_gated_whole = layers[0].up.num_outputs // 2 % panel == 0
    return is_gated_whole and all(size % lanes == 0 for size in (len(layers[0].input_norm), head_size))


def _weights_of(layer: DenseLayer, keys: Tensor, values: Tensor) -> _Weights:
    q_norm, k_norm = layer.qk_norms or (None, None)
    return _Weights(
        q_norm=None if q_norm is None else q_norm.data_ptr(),
        k_norm=None if k_norm is None else k_norm.data_ptr(),
        input_norm=layer.input_norm.data_ptr(),
        mlp_norm=layer.mlp_norm.data_ptr(),
        keys=keys.data_ptr(),
        values=values.data_ptr(),
        window=layer.sliding_window or 0,
        **{
            field: pointer
            for name, linear in (("qkv", layer.qkv), ("o", layer.o), ("up", layer.up), ("down", layer.down))
            for field, pointer in ((name, linear.panels.data_ptr()), (f"{name}_bias", linear.bias_pointer))
        },
    )
