"""Messages of a pipeline with random content, and whether two are equal."""

import string
from dataclasses import fields, is_dataclass
from typing import Any

import hypothesis.strategies as st
import numpy as np
import torch
from hypothesis.extra import numpy as arrays

from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.request import TokenLogprobs
from rayserve_sarathi.step import (
    SAMPLING_DTYPE,
    LogitBias,
    PendingTokens,
    PromptLogprobsQuery,
    StageTiming,
    StepFault,
    StepInput,
    StepOutput,
    TokenHistory,
)

FLOAT_DTYPES = (
    torch.float64,
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)

_ints = st.integers(-(2**63), 2**63 - 1)
_floats = st.floats(allow_nan=False)  # but with infinities: minus infinity is a log-probability
_seconds = st.floats(0, 1e9)
_int32_arrays = arrays.arrays(np.int32, st.integers(0, 5))
_texts = st.text(string.printable + "é世\ud800", max_size=8)


@st.composite
def _sampling(draw: st.DrawFn) -> np.ndarray:
    num_rows = draw(st.integers(0, 4))
    size = num_rows * SAMPLING_DTYPE.itemsize
    return np.frombuffer(bytearray(draw(st.binary(min_size=size, max_size=size))), dtype=SAMPLING_DTYPE)


_histories = st.builds(TokenHistory, row=_ints, prompt_token_ids=_int32_arrays, output_token_ids=_int32_arrays)
_queries = st.builds(PromptLogprobsQuery, request=_ints, num_logprobs=_ints, target_token_ids=_int32_arrays)
_biases = st.builds(
    LogitBias,
    rows=_int32_arrays,
    token_ids=_int32_arrays,
    values=arrays.arrays(np.float32, st.integers(0, 4)),
)
_logprobs = st.builds(
    TokenLogprobs,
    _ints,
    _floats,
    st.lists(_ints, max_size=3).map(tuple),
    st.lists(_floats, max_size=3).map(tuple),
)
_faults = st.none() | st.builds(
    StepFault, message=_texts, stage=_ints, is_stage_broken=st.booleans(), is_consequence=st.booleans()
)
_timings = st.builds(StageTiming, stage=_ints, receive_s=_seconds, start_s=_seconds, end_s=_seconds)


def _tuples(items: st.SearchStrategy[Any]) -> st.SearchStrategy[tuple[Any, ...]]:
    return st.lists(items, max_size=3).map(tuple)


step_inputs = st.builds(
    StepInput,
    step_id=_ints,
    epoch=_ints,
    request_ids=_tuples(_texts),
    token_ids=_int32_arrays,
    query_lens=_int32_arrays,
    context_lens=_int32_arrays,
    block_tables=_int32_arrays,
    num_blocks=_int32_arrays,
    sample_requests=_int32_arrays,
    sampling=_sampling(),
    pending=st.none() | st.builds(PendingTokens, positions=_int32_arrays, samples=_int32_arrays),
    histories=_tuples(_histories),
    logit_bias=st.none() | _biases,
    prompt_logprobs=_tuples(_queries),
)

step_outputs = st.builds(
    StepOutput,
    step_id=_ints,
    epoch=_ints,
    token_ids=_int32_arrays,
    logprobs=st.dictionaries(_ints, _logprobs, max_size=3),
    prompt_logprobs=st.dictionaries(_ints, _tuples(_logprobs), max_size=3),
    errors=st.dictionaries(_ints, _texts, max_size=3),
    timings=_tuples(_timings),
    fault=_faults,
)


@st.composite
def hidden_states(draw: st.DrawFn) -> torch.Tensor:
    """Tensors [T, D] of any float type, some with strides, some empty."""
    shape = (draw(st.integers(0, 3)), draw(st.integers(0, 3)))
    seed = draw(st.integers(0, 2**31))
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    hidden = values.to(draw(st.sampled_from(FLOAT_DTYPES)))
    return hidden.T if draw(st.booleans()) else hidden


stage_messages = st.builds(
    StageMessage,
    step=step_inputs,
    hidden=st.none() | hidden_states(),
    timings=_tuples(_timings),
    fault=_faults,
)


def are_equal(first: Any, second: Any) -> bool:
    """Whether two messages, or parts of them, are of the same types and hold the same, to the bit."""
    if type(first) is not type(second):
        return False
    if isinstance(first, torch.Tensor):
        same_kind = first.dtype == second.dtype and first.shape == second.shape
        # To the bit, as a NaN differs from itself.
        return same_kind and torch.equal(_bits(first), _bits(second))
    if isinstance(first, np.ndarray):
        return first.dtype == second.dtype and first.shape == second.shape and first.tobytes() == second.tobytes()
    if is_dataclass(first):
        return all(are_equal(getattr(first, field.name), getattr(second, field.name)) for field in fields(first))
    if isinstance(first, tuple):
        return len(first) == len(second) and all(map(are_equal, first, second))
    return bool(first == second)


def _bits(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.clone(memory_format=torch.contiguous_format).reshape(-1).view(torch.uint8)
