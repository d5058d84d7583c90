"""The time of a step, summed over operators, layers and stages; a `StepTimeModel` from either source.

A layer takes its norms, QKV projection, rotary embedding, attention of the decodes and of each chunk, output
projection, MLP, residual additions, and an all-reduce after attention and another after the MLP (one for both where
they stand beside each other). The first stage looks tokens up; the last has the head and the sampler. Operators follow
one another as kernels on a GPU do, so times add up, as they do in Vidur (MLSys'24). Where several chunks share a step
their attention adds up too, as queries of one never see keys of another; Vidur takes the root of the sum of squares of
their lengths as the length of a single one instead.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from rayserve_sarathi.simulation.model_shape import RankShape
from rayserve_sarathi.simulation.operator_times import OperatorTimes
from rayserve_sarathi.step_shape import StepShape


@dataclass(frozen=True, slots=True, kw_only=True)
class _TokenTimes:
    """Times that depend on the number of tokens alone.

    Args:
        layer_s: Of a layer without attention.
        embedding_s: On the first stage.
        transfer_s: To the next stage.
    """

    layer_s: float
    embedding_s: float
    transfer_s: float


class CostModel:
    """Predicts the stage times of steps. What was computed for a number of tokens or requests is remembered.

    Args:
        shape: Of a rank, with the layers of each stage.
        times: Of operators on a rank.
        itemsize: Bytes of an element of the hidden states.
    """

    def __init__(self, shape: RankShape, times: OperatorTimes, *, itemsize: int) -> None:
        self._shape = shape
        self._times = times
        self._token_bytes = shape.hidden_size * itemsize
        self._layers_per_stage = shape.layers_per_stage
        self._by_tokens: dict[int, _TokenTimes] = {}
        self._sample_s: dict[int, float] = {}
        self._prepare_s: dict[int, float] = {}
        self._schedule_s: dict[int, float] = {}

    @property
    def num_stages(self) -> int:
        """Stages of the pipeline."""
        return len(self._layers_per_stage)

    def stage_times_s(self, shape: StepShape) -> list[float]:
        """Return the time of each stage: its layers, and the CPU time of its own that goes before them.

        The first stage's CPU time is in `cpu_s`, as no step waits for it while another computes.
        """
        tokens = self._of_tokens(shape.num_tokens)
        times = [num_layers * tokens.layer_s for num_layers in self._layers_per_stage]
        for window, layers in self._shape.windows:
            attention_s = self._attention_s(shape, window)
            for stage, num_layers in enumerate(layers):
                times[stage] += num_layers * attention_s
        times[0] += tokens.embedding_s
        times[-1] += _remembered(self._sample_s, shape.num_samples, self._times.sample_s)
        if len(times) > 1:
            prepare_s = _remembered(self._prepare_s, _num_requests(shape), self._times.prepare_s)
            for stage in range(1, len(times)):
                times[stage] += prepare_s
        return times

    def transfer_s(self, shape: StepShape) -> float:
        """Return how long the hidden states take from a stage to the next; 0 where there is only one."""
        return self._of_tokens(shape.num_tokens).transfer_s

    def cpu_s(self, shape: StepShape) -> float:
        """Return the CPU time of the scheduler and of the first stage's host."""
        num_requests = _num_requests(shape)
        schedule_s = _remembered(self._schedule_s, num_requests, self._times.schedule_s)
        return schedule_s + _remembered(self._prepare_s, num_requests, self._times.prepare_s)

    def parts_s(self, shape: StepShape) -> Mapping[str, float]:
        """Return the time of each part of a step, over all layers and stages; they add up to `latency_s`."""
        num_tokens, num_layers = shape.num_tokens, sum(self._layers_per_stage)
        parts = {
            operator: num_layers * seconds for operator, seconds in self._times.token_operators_s(num_tokens).items()
        }
        decode_s = chunk_s = 0.0
        for window, layers in self._shape.windows:
            decode_s += sum(layers) * self._decode_s(shape, window)
            chunk_s += sum(layers) * self._chunks_s(shape, window)
        return parts | {
            "decode_attention": decode_s,
            "chunk_attention": chunk_s,
            "all_reduce": num_layers * self._all_reduces_s(num_tokens),
            "embedding": self._times.embedding_s(num_tokens),
            "head_and_sampler": self._times.sample_s(shape.num_samples),
            "transfer": (self.num_stages - 1) * self.transfer_s(shape),
            "cpu": self.cpu_s(shape) + (self.num_stages - 1) * self._times.prepare_s(_num_requests(shape)),
        }

    def latency_s(self, shape: StepShape) -> float:
        """Return the time of a step that has the pipeline for itself, from the scheduler to what it samples."""
        return self.cpu_s(shape) + sum(self.stage_times_s(shape)) + (self.num_stages - 1) * self.transfer_s(shape)

    def _of_tokens(self, num_tokens: int) -> _TokenTimes:
        if (times := self._by_tokens.get(num_tokens)) is None:
            operators = self._times.token_operators_s(num_tokens)
            times = _TokenTimes(
                layer_s=sum(operators.values()) + self._all_reduces_s(num_tokens),
                embedding_s=self._times.embedding_s(num_tokens),
                transfer_s=self._times.send_s(num_tokens * self._token_bytes) if self.num_stages > 1 else 0.0,
            )
            self._by_tokens[num_tokens] = times
        return times

    def _all_reduces_s(self, num_tokens: int) -> float:
        return self._shape.num_all_reduces * self._times.all_reduce_s(num_tokens * self._token_bytes)

    def _attention_s(self, shape: StepShape, window: int | None) -> float:
        return self._decode_s(shape, window) + self._chunks_s(shape, window)

    def _decode_s(self, shape: StepShape, window: int | None) -> float:
        if not shape.num_decodes:
            return 0.0
        context_tokens = shape.decode_context_tokens
        if window is not None:
            # Only their sum is known: as if all were as long as their mean.
            context_tokens = min(context_tokens, window * shape.num_decodes)
        return self._times.decode_attention_s(shape.num_decodes, context_tokens)

    def _chunks_s(self, shape: StepShape, window: int | None) -> float:
        seconds = 0.0
        for query_len, context_len in shape.chunks:
            if window is None or context_len + query_len <= window:
                seconds += self._times.chunk_attention_s(query_len, context_len)
                continue
            for start in range(0, query_len, window):
                piece = min(window, query_len - start)
                seconds += self._times.chunk_attention_s(piece, _seen_context(piece, context_len + start, window))
        return seconds


def _seen_context(query_len: int, context_len: int, window: int) -> int:
    """Return the context with which a chunk of at most `window` tokens has as many pairs of query and key."""
    num_whole = min(query_len, max(0, window - context_len))  # queries that see all before them, and themselves
    num_pairs = num_whole * context_len + num_whole * (num_whole + 1) // 2 + (query_len - num_whole) * window
    return max(0, (2 * num_pairs - query_len * (query_len + 1)) // (2 * query_len))


def _num_requests(shape: StepShape) -> int:
    return shape.num_decodes + len(shape.chunks)


def _remembered(known: dict[int, float], key: int, compute: Callable[[int], float]) -> float:
    if (value := known.get(key)) is None:
        value = known[key] = compute(key)
    return value
