"""Pack the chunks of a step into the flat arrays of a `StepInput`.

Whole arrays are joined as bytes: block tables and tokens are `array('i')`, sampling rows are packed once per request,
so the cost per request and step is a few list appends.
"""

import math
from array import array
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from rayserve_sarathi.request import Request, SamplingParams
from rayserve_sarathi.step import (
    SAMPLING_DTYPE,
    Float32Array,
    LogitBias,
    PendingTokens,
    PromptLogprobsQuery,
    StepInput,
    TokenHistory,
)


def has_extras(sampling: SamplingParams) -> bool:
    """Whether requests with this `sampling` need more in a step than their row of `SAMPLING_DTYPE`."""
    return bool(
        sampling.has_penalties or sampling.logit_bias or sampling.min_tokens or sampling.prompt_logprobs is not None
    )


def build_step_input(
    decodes: list[Request],
    prefills: dict[Request, int],
    sampled_prefills: list[Request],
    *,
    step_id: int,
    epoch: int,
    before: Sequence[Request] = (),
) -> StepInput:
    """Return the step's message.

    Args:
        decodes: Requests that compute the token they generated last, or will by then: those in flight.
        prefills: Chunks that follow each request's `num_scheduled_tokens`, single tokens first.
        sampled_prefills: Those of `prefills` whose chunk ends their known tokens, in the same order.
        step_id: Number of the step.
        epoch: Generation of the pipeline.
        before: Requests that sample a token in the step before, in order; only looked at if `decodes` are in it.
    """
    num_decodes = len(decodes)
    requests = [*decodes, *prefills]
    pending = _pending_tokens(decodes, before) if before else None
    if pending is None:
        context_lens = [request.num_computed_tokens for request in decodes]
    else:
        context_lens = [request.num_scheduled_tokens for request in decodes]
    context_lens += [request.num_scheduled_tokens for request in prefills]
    token_ids = array("i", [request.token_ids[-1] for request in decodes])
    for (request, num_new), start in zip(prefills.items(), context_lens[num_decodes:], strict=True):
        token_ids += request.token_ids[start : start + num_new]
    tables = [request.block_table for request in requests]
    sample_requests = list(range(num_decodes))
    if sampled_prefills:
        index_of = {request: num_decodes + index for index, request in enumerate(prefills)}
        sample_requests += [index_of[request] for request in sampled_prefills]
    rows = [request.sampling_row for request in (*decodes, *sampled_prefills)]
    extras = [index for index, request in enumerate(requests) if request.has_extras]
    query_lens = [1] * num_decodes + list(prefills.values())
    row_of = {index: row for row, index in enumerate(sample_requests)} if extras else {}
    histories, logit_bias, prompt_logprobs = _pack_extras(
        [
            _Extra(
                requests[index],
                index,
                query_lens[index],
                row_of.get(index),
                requests[index].num_output_tokens + (index < num_decodes and requests[index].num_in_flight_tokens > 0),
            )
            for index in extras
        ]
    )
    return StepInput(
        step_id=step_id,
        epoch=epoch,
        request_ids=tuple([request.request_id for request in requests]),
        token_ids=np.frombuffer(token_ids, dtype=np.int32),
        query_lens=np.array(query_lens, dtype=np.int32),
        context_lens=np.array(context_lens, dtype=np.int32),
        # Into bytearrays, as torch refuses to take over memory that is read-only.
        block_tables=np.frombuffer(bytearray().join(tables), dtype=np.int32),
        num_blocks=np.array(list(map(len, tables)), dtype=np.int32),
        sample_requests=np.array(sample_requests, dtype=np.int32),
        sampling=np.frombuffer(bytearray().join(rows), dtype=SAMPLING_DTYPE),
        pending=pending,
        histories=histories,
        logit_bias=logit_bias,
        prompt_logprobs=prompt_logprobs,
    )


def _pending_tokens(decodes: list[Request], before: Sequence[Request]) -> PendingTokens | None:
    positions = [index for index, request in enumerate(decodes) if request.num_in_flight_tokens]
    if not positions:
        return None
    sample_of = {request: sample for sample, request in enumerate(before)}
    return PendingTokens(
        positions=np.array(positions, dtype=np.int32),
        samples=np.array([sample_of[decodes[index]] for index in positions], dtype=np.int32),
    )


class _Extra(NamedTuple):
    request: Request
    number: int
    """Which of the requests."""
    query_len: int
    row: int | None
    """Which of the sampling requests, if it samples."""
    num_output_tokens: int
    """Before this step, one that is on its way included."""


def _pack_extras(
    entries: list[_Extra],
) -> tuple[tuple[TokenHistory, ...], LogitBias | None, tuple[PromptLogprobsQuery, ...]]:
    histories: list[TokenHistory] = []
    biases: list[tuple[int, int, float]] = []
    queries: list[PromptLogprobsQuery] = []
    for request, number, query_len, row, num_output_tokens in entries:
        sampling = request.sampling
        if row is not None:
            if sampling.has_penalties:
                histories.append(_history(request, row))
            biases.extend((row, token_id, bias) for token_id, bias in sampling.logit_bias)
            if num_output_tokens < sampling.min_tokens:
                biases.extend((row, token_id, -math.inf) for token_id in request.stop_token_ids)
        if sampling.prompt_logprobs is not None and num_output_tokens == 0:
            start = request.num_scheduled_tokens + 1
            targets = request.token_ids[start : min(start + query_len, request.num_prompt_tokens)]
            queries.append(
                PromptLogprobsQuery(
                    request=number,
                    num_logprobs=sampling.prompt_logprobs,
                    target_token_ids=np.array(targets, dtype=np.int32),
                )
            )
    return tuple(histories), _logit_bias(biases), tuple(queries)


def _history(request: Request, row: int) -> TokenHistory:
    token_ids = np.array(request.token_ids, dtype=np.int32)
    num_prompt_tokens = request.num_prompt_tokens
    return TokenHistory(
        row=row, prompt_token_ids=token_ids[:num_prompt_tokens], output_token_ids=token_ids[num_prompt_tokens:]
    )


def _logit_bias(biases: list[tuple[int, int, float]]) -> LogitBias | None:
    if not biases:
        return None
    rows, token_ids, values = zip(*biases, strict=True)
    values_array: Float32Array = np.array(values, dtype=np.float32)
    return LogitBias(
        rows=np.array(rows, dtype=np.int32), token_ids=np.array(token_ids, dtype=np.int32), values=values_array
    )
