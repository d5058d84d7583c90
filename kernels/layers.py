"""A step of a stage in one call to the C++ kernels, for CPUs: embedding, all layers, norm, head, and a token.

They compute what each one's own kernels do one after the other, to the same bits, by threads of the stage's own that
work through what they are told as a GPU's stream does: the call returns at once, and a step begins when the one before
it ends, whose tokens it takes, without waiting for Python.

Dimensions: T tokens in the step; R requests, W of them wanted; D hidden size; V vocabulary; F intermediate size; N
query and K KV heads; H head size; P blocks in the pool; S tokens per block.
"""

import ctypes
import os
import sys
import weakref
from collections import deque
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
Float32Array = npt.NDArray[np.float32]
Float64Array = npt.NDArray[np.float64]

_NO_FAULT, _UNKNOWN_TOKEN, _WRONG_LENGTHS, _NO_MEMORY = range(4)
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
        *((name, ctypes.c_void_p) for name in ("block_tables", "pending_positions", "pending_samples", "sampled")),
        *((name, ctypes.c_void_p) for name in ("hidden", "cos", "sin")),
        *((name, ctypes.c_int64) for name in ("num_tokens", "num_requests", "num_wanted", "num_block_ids")),
        *((name, ctypes.c_int64) for name in ("num_pending", "num_sampled")),
    )


class _Vocabulary(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("embedding", "norm", "head")),
        ("size", ctypes.c_int64),
    )


class _Launch(ctypes.Structure):
    _fields_ = (
        *((name, ctypes.c_void_p) for name in ("layers", "sizes", "vocabulary")),
        ("num_layers", ctypes.c_int64),
        ("step", _Step),
        *((name, ctypes.c_void_p) for name in ("out", "settings", "likeliest", "chosen")),
        *((name, ctypes.c_int64) for name in ("fault", "is_done")),
        *((name, ctypes.c_double) for name in ("begin_s", "end_s")),
    )


_LONG = ("token_ids", "block_tables")


class StepArrays(NamedTuple):
    """A step as `StepInput` describes it.

    Args:
        token_ids: [T].
        query_lens: [R].
        context_lens: [R].
        num_blocks: [R].
        wanted: Requests with whose last token alone the last layer goes on, once it has stored keys and values, [W].
        block_tables: Block ids of each request's context and chunk, concatenated.
        pending_positions: Which of the T tokens are some that the step before sampled, [P].
        pending_samples: Which of those each is, [P].
    """

    token_ids: Int32Array
    query_lens: Int32Array
    context_lens: Int32Array
    num_blocks: Int32Array
    wanted: Int32Array
    block_tables: Int32Array
    pending_positions: Int32Array
    pending_samples: Int32Array


class StageRun:
    """A step that a stage is to compute, or has computed; what it makes may be read once `finish` has returned.

    Args:
        stream: Of the stage.
        launch: What it was told.
        step: What is to be computed; None for tokens alone, of logits.
        out: [W, V] or [T, D] or [W, D].
        likeliest: [W].
        chosen: [W].
        kept: What else must stay in memory meanwhile.
        ended_fd: Counts the stream's runs that have ended, for event loops: see eventfd(2). None but on Linux.
    """

    def __init__(
        self,
        stream: int,
        launch: _Launch,
        step: StepArrays | None,
        *,
        out: Float32Array,
        likeliest: Int32Array,
        chosen: Int32Array,
        kept: tuple[object, ...],
        ended_fd: int | None,
    ) -> None:
        self._stream = stream
        self._launch = launch
        self._step = step
        self._kept = kept
        self.ended_fd = ended_fd
        self.out = out
        """Logits of what is wanted, or without a head hidden states."""
        self.likeliest = likeliest
        """The first of the largest logits of each, or -1 where that is not finite, as where any is NaN."""
        self.chosen = chosen
        """A token for each: one that is drawn, or the likeliest; 0 where there is none, or the step has a fault."""

    def launch(self) -> None:
        """Give it to the stage's threads, which compute steps in order."""
        load_library().sarathi_launch(self._stream, ctypes.byref(self._launch))

    def wait(self) -> None:
        """Return when the step is done, or has failed; any thread may call it."""
        load_library().sarathi_wait(self._stream, ctypes.byref(self._launch))

    def finish(self) -> None:
        """Return when the step is done; any thread may call it.

        Raises:
            IndexError: A token was not in the vocabulary, or the arrays' lengths did not fit each other.
            MemoryError: There was none left.
        """
        self.wait()
        step, fault = self._step, self._launch.fault
        if fault == _NO_FAULT:
            return
        if fault == _NO_MEMORY:
            raise MemoryError("there is no memory for the activations of the step")
        assert step is not None, f"fault {fault} of tokens alone"
        if fault == _UNKNOWN_TOKEN:
            raise IndexError(f"tokens {step.token_ids.tolist()} are not all in the vocabulary")
        assert fault == _WRONG_LENGTHS, f"{fault} is none of the kernel's faults"
        lens = {name: array.tolist() for name, array in step._asdict().items() if name not in _LONG}
        raise IndexError(f"{len(step.token_ids)} tokens and {len(step.block_tables)} block ids do not fit {lens}")

    @property
    def is_done(self) -> bool:
        """Whether `finish` would return at once."""
        return bool(self._launch.is_done)

    @property
    def times_s(self) -> tuple[float, float]:
        """When it began and when it ended, on the clock of `time.monotonic`."""
        return self._launch.begin_s, self._launch.end_s


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
        self._runs: deque[StageRun] = deque()
        """Those that may not be done, as they must stay in memory."""
        self._ended_fd: int | None = None
        if sys.platform == "linux":
            self._ended_fd = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)
        self._stream: int = library.sarathi_open_stream(
            torch.get_num_threads(), -1 if self._ended_fd is None else self._ended_fd
        )
        weakref.finalize(self, _close, self._stream, self._ended_fd)

    def hidden(self, step: StepArrays, hidden: Tensor | None, *, sampled: Int32Array | None, last_only: bool) -> Tensor:
        """Compute all layers.

        Args:
            step: What to compute.
            hidden: Of the stage before, [T, D] float32; None for the embedding of the tokens.
            sampled: What pending tokens are taken from; None for 0 in their place.
            last_only: Whether the last layer is to go on with what is wanted alone.

        Returns:
            [T, D] float32, or with `last_only` [W, D].

        Raises:
            IndexError: A token is not in the vocabulary, or the arrays' lengths do not fit each other.
        """
        num_rows = len(step.wanted) if last_only else len(step.token_ids)
        out = np.empty((num_rows, self._hidden_size), dtype=np.float32)
        run = self._begin(self._without_head, step, hidden, sampled, last_only=last_only, out=out, settings=None)
        run.finish()
        return torch.from_numpy(run.out)

    def launch(
        self, step: StepArrays, hidden: Tensor | None, *, sampled: Int32Array | None, settings: Float64Array | None
    ) -> StageRun:
        """Have all layers, norm and head computed, where there is one, and a token chosen, once all before is done.

        Args:
            step: What to compute.
            hidden: As in `hidden`.
            sampled: As in `hidden`; `chosen` of the run before will do, done or not.
            settings: How to draw tokens, [5, W], see `cpu_sampling.draw`; None for the likeliest ones.
        """
        assert self._with_head is not None, "it is not the last stage"
        assert settings is None or settings.shape == (5, len(step.wanted)), f"settings of {settings.shape}"
        out = np.empty((len(step.wanted), self._vocab_size), dtype=np.float32)
        return self._begin(self._with_head, step, hidden, sampled, last_only=True, out=out, settings=settings)

    def draw(self, logits: Tensor, settings: Float64Array) -> Tensor:
        """Return a token id for each row of logits, as `cpu_sampling.draw` does, computed by the stage's own threads.

        Those of OpenMP would keep cores from them for some milliseconds afterwards, as they wait actively.

        Args:
            logits: [n, V] float32.
            settings: See `cpu_sampling.draw`.
        """
        assert self._with_head is not None, "it is not the last stage"
        assert settings.shape == (5, len(logits)), f"settings of {settings.shape} for logits of {logits.shape}"
        logits = logits.contiguous()
        launch = _Launch(
            sizes=ctypes.addressof(self._sizes),
            vocabulary=ctypes.addressof(self._with_head),
            step=_Step(num_wanted=len(logits)),
        )
        run = self._enqueue(launch, None, out=logits.numpy(), settings=settings)
        run.finish()
        return torch.from_numpy(run.chosen)

    def _begin(
        self,
        vocabulary: _Vocabulary,
        step: StepArrays,
        hidden: Tensor | None,
        sampled: Int32Array | None,
        *,
        last_only: bool,
        out: Float32Array,
        settings: Float64Array | None,
    ) -> StageRun:
        if hidden is None:
            assert vocabulary.embedding is not None, "it is not the first stage"
        else:
            assert (hidden.device.type, hidden.dtype) == ("cpu", torch.float32), f"{hidden.device} {hidden.dtype}"
            assert hidden.shape == (len(step.token_ids), self._hidden_size), f"hidden states of {hidden.shape}"
            hidden = hidden.contiguous()
        cos, sin = self._angles(int((step.context_lens + step.query_lens).max()))
        packed = np.concatenate(step, dtype=np.int32)
        *starts, _ = accumulate((4 * len(array) for array in step), initial=packed.ctypes.data)
        places: dict[str, int | None] = dict(zip(step._fields, starts, strict=True))
        if not last_only:
            places["wanted"] = None
        launch = _Launch(
            layers=ctypes.addressof(self._weights),
            num_layers=len(self._weights),
            sizes=ctypes.addressof(self._sizes),
            vocabulary=ctypes.addressof(vocabulary),
            step=_Step(
                **places,
                sampled=None if sampled is None else sampled.ctypes.data,
                hidden=None if hidden is None else hidden.data_ptr(),
                cos=cos.data_ptr(),
                sin=sin.data_ptr(),
                num_tokens=len(step.token_ids),
                num_requests=len(step.query_lens),
                num_wanted=len(step.wanted),
                num_block_ids=len(step.block_tables),
                num_pending=len(step.pending_positions),
                num_sampled=0 if sampled is None else len(sampled),
            ),
        )
        return self._enqueue(launch, step, hidden, cos, sin, packed, sampled, out=out, settings=settings)

    def _enqueue(
        self,
        launch: _Launch,
        step: StepArrays | None,
        *kept: object,
        out: Float32Array,
        settings: Float64Array | None,
    ) -> StageRun:
        num_wanted = launch.step.num_wanted
        tokens = np.zeros(2 * num_wanted, dtype=np.int32)
        likeliest, chosen = tokens[:num_wanted], tokens[num_wanted:]
        launch.out = out.ctypes.data
        launch.settings = None if settings is None else settings.ctypes.data
        launch.likeliest = tokens.ctypes.data
        launch.chosen = launch.likeliest + chosen.itemsize * num_wanted
        run = StageRun(
            self._stream,
            launch,
            step,
            out=out,
            likeliest=likeliest,
            chosen=chosen,
            kept=(*kept, settings),
            ended_fd=self._ended_fd,
        )
        while self._runs and self._runs[0].is_done:
            self._runs.popleft()
        self._runs.append(run)
        run.launch()
        return run


def _close(stream: int, ended_fd: int | None) -> None:
    load_library().sarathi_close_stream(stream)
    if ended_fd is not None:
        os.close(ended_fd)


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
