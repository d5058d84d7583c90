"""CUDA graphs of whole steps: a stage's hundreds of kernels begin with one call, so that the device never waits for it.

A graph holds for one number of tokens and of requests; a step with fewer is filled up with tokens that are stored
nowhere and requests without a token. Steps of decodes have graphs of their own, whose attention splits long contexts.
Steps with chunks are filled up to whole tiles of 128 tokens, which matrix products do anyway (paper, section 4.3).

Dimensions: T tokens and R requests that a graph is for; M blocks of the longest request; D hidden size.
"""

import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rayserve_sarathi.execution.model_input import put_pending, step_layout
from rayserve_sarathi.kernels.attention.metadata import AttentionMetadata, StepLayout
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.step import StepInput

_TILE = 128
# A step of more tokens keeps the device busy for longer than its kernels take to begin one by one.
_MAX_CHUNK_TOKENS = 2048

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLimits:
    """The largest step.

    Args:
        num_tokens: Most tokens of it.
        num_seqs: Most requests of it.
        model_len: Most tokens of a request, those of earlier steps included.
    """

    num_tokens: int
    num_seqs: int
    model_len: int


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSize:
    """What a graph is for.

    Args:
        num_tokens: T.
        num_requests: R.
        has_chunks: Whether any request may have more than one token; without, R is T.
    """

    num_tokens: int
    num_requests: int
    has_chunks: bool


def refuse_graphs(decoder: Decoder) -> str | None:
    """Return why a stage's steps cannot be graphs, or None if they can."""
    if decoder.device.type != "cuda":
        return f"the device is {decoder.device.type}"
    if not decoder.backend.is_graphable:
        return "the attention backend plans each step on the host"
    if decoder.config.mlp == "experts":
        return "which experts compute is decided on the host"
    if decoder.tp.tp_size > 1:
        return "the layers are split over GPUs, whose collectives have not been tried in graphs"
    return None


def graph_sizes(limits: StepLimits) -> list[GraphSize]:
    """Return the sizes worth a graph, largest first, as later ones then use the memory of earlier ones."""
    max_num_seqs = limits.num_seqs
    # Up to some 200 rows a product takes as long as its weights take to be read, so a few rows more cost nothing.
    steps = (1, 2, 4, *range(8, 33, 8), *range(48, 65, 16), *range(96, max_num_seqs, 32), max_num_seqs)
    decodes = {count for count in steps if count <= max_num_seqs}
    tiles = range(_TILE, min(limits.num_tokens + _TILE - 1, _MAX_CHUNK_TOKENS) + 1, _TILE)
    sizes = [GraphSize(num_tokens=tokens, num_requests=max_num_seqs, has_chunks=True) for tokens in tiles]
    sizes += [GraphSize(num_tokens=count, num_requests=count, has_chunks=False) for count in decodes]
    return sorted(sizes, key=lambda size: -size.num_tokens)


def size_for(sizes: Sequence[GraphSize], *, num_tokens: int, num_requests: int) -> GraphSize | None:
    """Return the least of the sizes that a step fits, or None."""
    has_chunks = num_tokens > num_requests
    fitting = (
        size
        for size in sizes
        if size.has_chunks == has_chunks and size.num_tokens >= num_tokens and size.num_requests >= num_requests
    )
    return min(fitting, key=lambda size: size.num_tokens, default=None)


class StepTensors:
    """Tensors that stay where they are, for the graphs to read, and their twins on the host.

    Args:
        max_num_tokens: Most tokens of a step, filled up.
        max_num_seqs: Most requests of a step.
        max_num_blocks: M.
        device: Where the graphs read.
    """

    def __init__(self, *, max_num_tokens: int, max_num_seqs: int, max_num_blocks: int, device: torch.device) -> None:
        is_cuda = device.type == "cuda"
        lens = [max_num_tokens, max_num_tokens, max_num_tokens, max_num_seqs + 1, max_num_seqs]
        self._device = device
        self._host = torch.zeros(sum(lens), dtype=torch.int32, pin_memory=is_cuda)
        self._host_tables = torch.zeros((max_num_seqs, max_num_blocks), dtype=torch.int32, pin_memory=is_cuda)
        self._here = self._host.to(device)
        self._tables = self._host_tables.to(device)
        names = ("token_ids", "positions", "slot_mapping", "cu_query_lens", "seq_lens")
        self._arrays = {name: part.numpy() for name, part in zip(names, torch.split(self._host, lens), strict=True)}
        self._tensors: dict[str, Tensor] = dict(zip(names, torch.split(self._here, lens), strict=True))
        self._tables_array = self._host_tables.numpy()
        self._copied = torch.cuda.Event() if is_cuda else None  # type: ignore[no-untyped-call]  # torch's

    def token_ids(self, size: GraphSize) -> Tensor:
        """Return where the tokens are, [T] int32."""
        return self._tensors["token_ids"][: size.num_tokens]

    def metadata(self, size: GraphSize, layout: StepLayout) -> AttentionMetadata:
        """Return attention's view of them, for a backend that is graphable.

        Args:
            size: Of the graph.
            layout: A step of that size, to satisfy the type.
        """
        tensors = self._tensors
        nothing = torch.empty(0, dtype=torch.int32, device=self._device)
        return AttentionMetadata(
            positions=tensors["positions"][: size.num_tokens],
            slot_mapping=tensors["slot_mapping"][: size.num_tokens],
            cu_query_lens=tensors["cu_query_lens"][: size.num_requests + 1],
            seq_lens=tensors["seq_lens"][: size.num_requests],
            block_tables=self._tables[: size.num_requests],
            has_chunks=size.has_chunks,
            new_block_ids=nothing,
            cu_seq_lens=nothing,
            layout=layout,
        )

    def write(self, token_ids: np.ndarray, layout: StepLayout, size: GraphSize) -> None:
        """Put a step there, filled up to a size.

        Args:
            token_ids: At most T.
            layout: Of the step.
            size: Of the graph that will read.
        """
        if self._copied is not None:
            # The last step's may still be on their way.
            self._copied.synchronize()
        num_tokens, num_requests = len(token_ids), len(layout.query_lens)
        filled = {
            "token_ids": (token_ids, 0),
            "positions": (layout.positions, 0),
            "slot_mapping": (layout.slot_mapping, -1),
            "seq_lens": (layout.seq_lens, 0),
        }
        for name, (values, filler) in filled.items():
            array = self._arrays[name]
            array[: len(values)] = values
            array[len(values) : size.num_requests if name == "seq_lens" else size.num_tokens] = filler
        first_tokens = self._arrays["cu_query_lens"]
        first_tokens[: num_requests + 1] = layout.cu_query_lens
        # Without chunks token i is request i's, one that fills up too.
        rest = first_tokens[num_requests + 1 : size.num_requests + 1]
        rest[:] = num_tokens if size.has_chunks else np.arange(num_tokens + 1, num_tokens + 1 + len(rest))
        num_columns = layout.block_tables.shape[1]
        self._tables_array[:num_requests, :num_columns] = layout.block_tables
        self._here.copy_(self._host, non_blocking=True)
        self._tables[:num_requests, :num_columns].copy_(
            self._host_tables[:num_requests, :num_columns], non_blocking=True
        )
        if self._copied is not None:
            self._copied.record()


class StepGraphs:
    """The graphs of a stage, recorded at its start.

    Args:
        decoder: The stage's; `refuse_graphs` returns None for it.
        kv_caches: Of its layers.
        block_size: Tokens per block.
        limits: The largest step.
    """

    def __init__(
        self,
        decoder: Decoder,
        kv_caches: Sequence[tuple[Tensor, Tensor]],
        *,
        block_size: int,
        limits: StepLimits,
    ) -> None:
        self._decoder = decoder
        self._kv_caches = kv_caches
        self._block_size = block_size
        self._sizes = graph_sizes(limits)
        most = self._sizes[0].num_tokens
        self._tensors = StepTensors(
            max_num_tokens=most,
            max_num_seqs=limits.num_seqs,
            max_num_blocks=-(-limits.model_len // block_size),
            device=decoder.device,
        )
        width = 0 if decoder.is_first else decoder.config.hidden_size
        self._hidden = torch.zeros((most, width), dtype=decoder.dtype, device=decoder.device)
        self._graphs: dict[GraphSize, tuple[torch.cuda.CUDAGraph, Tensor]] = {}
        start_s = time.perf_counter()
        before = torch.cuda.memory_reserved(decoder.device)
        pool = torch.cuda.graph_pool_handle()
        for size in self._sizes:
            self._graphs[size] = self._record(size, pool)
        _logger.info(
            "%d CUDA graphs of steps of up to %d tokens in %.1f s, %.0f MiB",
            len(self._sizes),
            most,
            time.perf_counter() - start_s,
            (torch.cuda.memory_reserved(decoder.device) - before) / 2**20,
        )

    def run(self, step: StepInput, hidden: Tensor | None, *, sampled: Tensor | None = None) -> Tensor | None:
        """Compute a step's tokens in the stage's layers, or return None if no graph is for it.

        Args:
            step: What to compute.
            hidden: Output of the stage before, [T, D]; None on the first stage.
            sampled: Tokens of the step before, [S], for those that are pending.

        Returns:
            [T, D]; on the last stage [R, D], of each request's last token, which the next step may overwrite.
        """
        size = size_for(self._sizes, num_tokens=step.num_tokens, num_requests=len(step.query_lens))
        if size is None:
            return None
        self._tensors.write(step.token_ids, step_layout(step, block_size=self._block_size), size)
        if step.pending is not None:
            put_pending(self._tensors.token_ids(size), step.pending, sampled)
        if hidden is not None:
            self._hidden[: step.num_tokens].copy_(hidden, non_blocking=True)
        graph, out = self._graphs[size]
        graph.replay()
        if self._decoder.is_last:
            return out[: len(step.query_lens)]
        # The stage after may still read it while this one begins its next step.
        return out[: step.num_tokens].clone()

    def _record(self, size: GraphSize, pool: Any) -> tuple[torch.cuda.CUDAGraph, Tensor]:
        # Nothing is stored, and no key is read: only shapes matter.
        lens = np.ones(size.num_requests, dtype=np.int64)
        layout = StepLayout(
            query_lens=lens,
            context_lens=0 * lens,
            block_tables=0 * lens,
            num_blocks=lens,
            block_size=self._block_size,
        )
        metadata = self._tensors.metadata(size, layout)
        metadata.slot_mapping.fill_(-1)
        metadata.seq_lens.zero_()
        metadata.cu_query_lens.zero_()

        def compute() -> Tensor:
            decoder = self._decoder
            token_ids = self._tensors.token_ids(size)
            hidden = decoder.embed(token_ids) if decoder.is_first else self._hidden[: size.num_tokens]
            return decoder.forward(hidden, metadata, self._kv_caches, last_only=decoder.is_last)

        # Outside a graph first: kernels are compiled, and libraries choose theirs.
        stream = torch.cuda.Stream(self._decoder.device)  # type: ignore[no-untyped-call]  # torch's
        stream.wait_stream(torch.cuda.current_stream(self._decoder.device))
        with torch.cuda.stream(stream):
            compute()
        torch.cuda.current_stream(self._decoder.device).wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool, stream=stream):
            out = compute()
        return graph, out
