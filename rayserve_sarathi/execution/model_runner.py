"""Run the steps of one stage, or of a rank of it. It knows weights, KV cache and kernels, and nothing of requests.

Dimensions: T tokens in the step; D hidden size; S requests that sample a token; V vocabulary.
"""

import logging
import math
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from rayserve_sarathi.execution.cuda_graphs import StepGraphs, StepLimits, refuse_graphs
from rayserve_sarathi.execution.kv_cache import allocate_kv_caches
from rayserve_sarathi.execution.logprobs import token_logprobs
from rayserve_sarathi.execution.model_input import build_model_input, first_tokens, sampled_tokens
from rayserve_sarathi.execution.sampler import NOT_FINITE, sample
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.request import TokenLogprobs
from rayserve_sarathi.step import Int32Array, PromptLogprobsQuery, StepInput, StepOutput

# Logits of a whole chunk at once would be 500 MB for 1024 tokens and a vocabulary of 128 thousand.
_MAX_PROMPT_LOGITS_ROWS = 128

_logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogits:
    """What the ranks of the last stage make together, and rank 0 samples from.

    Args:
        logits: Of the sampling requests, [S, V] float32; None if there are none.
        prompt_logprobs: As in `StepOutput`; on rank 0 only.
    """

    logits: Tensor | None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]]


class ModelRunner:
    """One stage, ready to run.

    Args:
        decoder: The stage's part of the model.
        num_blocks: KV blocks, the same on every stage.
        block_size: Tokens per block.
        graph_limits: The largest step, to record CUDA graphs where the stage's steps can be; None for no graphs.
    """

    @torch.inference_mode()
    def __init__(
        self, decoder: Decoder, *, num_blocks: int, block_size: int, graph_limits: StepLimits | None = None
    ) -> None:
        self._decoder = decoder
        self._block_size = block_size
        self._kv_caches = allocate_kv_caches(decoder, num_blocks=num_blocks, block_size=block_size)
        self._graphs: StepGraphs | None = None
        if graph_limits is not None:
            reason = refuse_graphs(decoder)
            if reason is None:
                self._graphs = StepGraphs(decoder, self._kv_caches, block_size=block_size, limits=graph_limits)
            elif decoder.device.type == "cuda":
                _logger.info("no CUDA graphs, as %s", reason)

    @property
    def is_last(self) -> bool:
        """Whether this stage samples."""
        return self._decoder.is_last

    @torch.inference_mode()
    def forward(self, step: StepInput, hidden: Tensor | None) -> Tensor:
        """Compute the step's tokens in this stage's layers.

        Args:
            step: What to compute.
            hidden: Output of the stage before, [T, D], on any device; None on the first stage.

        Returns:
            Input of the stage after, or of `logits` on the last stage, [T, D].
        """
        decoder = self._decoder
        if self._graphs is not None and (out := self._graphs.run(step, hidden)) is not None:
            return out
        model_input = build_model_input(step, block_size=self._block_size, device=decoder.device)
        if hidden is None:
            hidden = decoder.embed(model_input.token_ids)
        return decoder.forward(hidden.to(decoder.device), model_input.metadata, self._kv_caches)

    @torch.inference_mode()
    def logits(self, step: StepInput, hidden: Tensor) -> StepLogits:
        """Compute what `sample` needs; last stage only, and there on all ranks, as each has a part of the logits.

        Args:
            step: What `forward` got.
            hidden: What `forward` returned, [T, D].
        """
        logits = self._decoder.logits(hidden[sampled_tokens(step)]) if len(step.sample_requests) else None
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        for query in step.prompt_logprobs:
            reports = self._prompt_logprobs(step, hidden, query)
            if self._is_chooser:
                prompt_logprobs[query.request] = reports
        return StepLogits(logits=logits, prompt_logprobs=prompt_logprobs)

    @torch.inference_mode()
    def sample(self, step: StepInput, made: StepLogits) -> StepOutput:
        """Choose the step's new tokens; no rank waits for another here.

        Args:
            step: What `forward` got.
            made: What `logits` returned.

        Returns:
            The output, without timings; on ranks other than 0, without tokens too.
        """
        token_ids: Int32Array = np.empty(0, np.int32)
        logprobs: dict[int, TokenLogprobs] = {}
        bad_requests: list[int] = []
        if made.logits is not None and self._is_chooser:
            token_ids, logprobs, bad_rows = sample(made.logits, step)
            bad_requests = step.sample_requests[bad_rows].tolist()
        bad_requests += [
            request
            for request, reports in made.prompt_logprobs.items()
            if any(not math.isfinite(report.logprob) for report in reports)
        ]
        return StepOutput(
            step_id=step.step_id,
            epoch=step.epoch,
            token_ids=token_ids,
            logprobs=logprobs,
            prompt_logprobs=made.prompt_logprobs,
            errors=dict.fromkeys(bad_requests, NOT_FINITE),
        )

    @property
    def _is_chooser(self) -> bool:
        return self._decoder.tp.tp_rank == 0

    def _prompt_logprobs(
        self, step: StepInput, hidden: Tensor, query: PromptLogprobsQuery
    ) -> tuple[TokenLogprobs, ...]:
        """Return a report for each target; none on ranks other than 0, which give their part of the logits only."""
        start = int(first_tokens(step)[query.request])
        targets = query.target_token_ids.tolist()
        reports: list[TokenLogprobs] = []
        for done in range(0, len(targets), _MAX_PROMPT_LOGITS_ROWS):
            part = targets[done : done + _MAX_PROMPT_LOGITS_ROWS]
            logits = self._decoder.logits(hidden[start + done : start + done + len(part)])
            if self._is_chooser:
                reports += token_logprobs(logits.log_softmax(dim=-1), part, [query.num_logprobs] * len(part))
        return tuple(reports)
