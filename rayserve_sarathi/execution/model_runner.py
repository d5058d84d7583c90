"""Run the steps of one stage, or of a rank of it. It knows weights, KV cache and kernels, and nothing of requests.

Dimensions: T tokens in the step; R requests; D hidden size; S requests that sample a token; V vocabulary.
"""

import logging
import math
from dataclasses import dataclass, field, replace

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from rayserve_sarathi.execution.cuda_graphs import StepGraphs, StepLimits, refuse_graphs
from rayserve_sarathi.execution.kv_cache import allocate_kv_caches
from rayserve_sarathi.execution.logprobs import token_logprobs
from rayserve_sarathi.execution.model_input import build_model_input, first_tokens
from rayserve_sarathi.execution.sampler import NOT_FINITE, Sampled, Sampling, draw_settings, sample
from rayserve_sarathi.kernels.layers import DenseStage, StageRun, StepArrays
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.request import TokenLogprobs
from rayserve_sarathi.step import Int32Array, PromptLogprobsQuery, StepInput, StepOutput

# Logits of a whole chunk at once would be 500 MB for 1024 tokens and a vocabulary of 128 thousand.
_MAX_PROMPT_LOGITS_ROWS = 128

_NONE = np.empty(0, dtype=np.int32)

_logger = logging.getLogger(__name__)


class PendingOutput:
    """What will come of a step when the device gets there.

    Args:
        step: The step.
        sampling: What chooses the tokens of its sampling requests; None if there are none, or another rank's count.
        prompt_logprobs: As in `StepOutput`.
    """

    def __init__(
        self,
        step: StepInput,
        sampling: Sampling | StageRun | None,
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]],
    ) -> None:
        self._step = step
        self._sampling = sampling
        self._prompt_logprobs = prompt_logprobs

    def wait(self) -> StepOutput:
        """Return the output, without timings; any thread may call it."""
        step, sampling = self._step, self._sampling
        if isinstance(sampling, StageRun):
            sampling.finish()
            sampled = Sampled(sampling.chosen, {}, (sampling.likeliest < 0).nonzero()[0])
        elif sampling is not None:
            with torch.inference_mode():
                sampled = sampling.wait()
        else:
            sampled = Sampled(_NONE, {}, np.empty(0, dtype=np.int64))
        bad_requests = step.sample_requests[sampled.bad_rows].tolist()
        bad_requests += [
            request
            for request, reports in self._prompt_logprobs.items()
            if any(not math.isfinite(report.logprob) for report in reports)
        ]
        return StepOutput(
            step_id=step.step_id,
            epoch=step.epoch,
            token_ids=sampled.token_ids,
            logprobs=sampled.logprobs,
            prompt_logprobs=self._prompt_logprobs,
            errors=dict.fromkeys(bad_requests, NOT_FINITE),
        )

    @property
    def run(self) -> StageRun | None:
        """What `wait` waits for, if the C++ kernels compute it."""
        return self._sampling if isinstance(self._sampling, StageRun) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class StepLogits:
    """What the ranks of the last stage make together, and rank 0 samples from.

    Args:
        logits: Of the sampling requests, [S, V] float32; None if there are none.
        likeliest: The first of the largest ones of each, [S], or -1 where that is not finite; None if it is not known.
        prompt_logprobs: As in `StepOutput`; on rank 0 only.
    """

    logits: Tensor | None
    likeliest: Int32Array | None = None
    prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = field(default_factory=dict)


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
        self._newest: tuple[int, Tensor | StageRun] | None = None
        """The last step that sampled, and its tokens, [S], where they are, or what chooses them."""
        self.kv_caches = allocate_kv_caches(decoder, num_blocks=num_blocks, block_size=block_size)
        """Key and value pool of each layer."""
        self._joined = decoder.join(self.kv_caches)
        self._graphs: StepGraphs | None = None
        if graph_limits is not None:
            reason = refuse_graphs(decoder)
            if reason is None:
                self._graphs = StepGraphs(decoder, self.kv_caches, block_size=block_size, limits=graph_limits)
            elif decoder.device.type == "cuda":
                _logger.info("no CUDA graphs, as %s", reason)

    @property
    def is_joined(self) -> bool:
        """Whether one kernel computes a whole step."""
        return self._whole is not None

    @property
    def is_last(self) -> bool:
        """Whether this stage samples."""
        return self._decoder.is_last

    def returns_at_once(self, step: StepInput) -> bool:
        """Whether `compute` and `sample` only tell the C++ kernels what to do, though steps before may not be done."""
        is_whole = self._whole is not None and self._decoder.is_first and self._decoder.is_last
        return is_whole and not step.prompt_logprobs and not _needs_logits(step)

    @property
    def is_async(self) -> bool:
        """Whether the stage's calls return before the device has done what they ask for, if it samples."""
        return self.is_joined or self._decoder.device.type == "cuda"

    def compute(self, step: StepInput, hidden: Tensor | None) -> Tensor | StepLogits | StageRun:
        """Compute the stage's part of a step: what the next stage needs, [T, D], or on the last one what `sample` does.

        Args:
            step: What to compute.
            hidden: Output of the stage before, [T, D], on the host or a GPU; None on the first stage.
        """
        # Where a kernel does it all, torch's modes and operators would be a good part of the time between two steps.
        whole = self._whole
        if whole is not None and self.is_last and not step.prompt_logprobs:
            before = self._sampled_before(step)
            needs_logits = _needs_logits(step)
            is_random = not needs_logits and _is_any(step.sampling["temperature"])
            run = whole.launch(
                _arrays(step, step.sample_requests),
                hidden,
                sampled=before.chosen if isinstance(before, StageRun) else _on_host(before),
                settings=draw_settings(step) if is_random else None,
            )
            if not needs_logits:
                return run
            run.finish()
            return StepLogits(logits=torch.from_numpy(run.out) if len(run.out) else None, likeliest=run.likeliest)
        hidden = self.forward(step, hidden)
        return self.logits(step, hidden) if self.is_last else hidden

    @torch.inference_mode()
    def forward(self, step: StepInput, hidden: Tensor | None) -> Tensor:
        """Compute the step's tokens in this stage's layers.

        Args:
            step: What to compute.
            hidden: As in `compute`.

        Returns:
            Input of the stage after, [T, D]. On the last stage input of `logits`: of each request's last token,
            [R, D], unless log probabilities of prompts are wanted.
        """
        decoder = self._decoder
        last_only = decoder.is_last and not step.prompt_logprobs
        sampled = self._tokens_before(step)
        # A graph of the last stage has the last tokens alone.
        if (
            self._graphs is not None
            and last_only == decoder.is_last
            and (out := self._graphs.run(step, hidden, sampled=sampled)) is not None
        ):
            return out
        if (whole := self._whole) is not None:
            everyone = np.arange(len(step.query_lens), dtype=np.int32)
            return whole.hidden(_arrays(step, everyone), hidden, sampled=_on_host(sampled), last_only=last_only)
        model_input = build_model_input(step, block_size=self._block_size, device=decoder.device, sampled=sampled)
        if hidden is None:
            hidden = decoder.embed(model_input.token_ids)
        return decoder.forward(hidden.to(decoder.device), model_input.metadata, self.kv_caches, last_only=last_only)

    @torch.inference_mode()
    def logits(self, step: StepInput, hidden: Tensor) -> StepLogits:
        """Compute what `sample` needs; last stage only, and there on all ranks, as each has a part of the logits.

        Args:
            step: What `forward` got.
            hidden: What `forward` returned.
        """
        rows = step.sample_requests.astype(np.int64)
        if step.prompt_logprobs:  # then there is a row for each token
            rows = first_tokens(step)[1:][rows] - 1
        of_rows = hidden if len(rows) == len(hidden) else hidden[rows]  # ascending, so these are all
        logits = self._decoder.logits(of_rows) if len(rows) else None
        prompt_logprobs: dict[int, tuple[TokenLogprobs, ...]] = {}
        for query in step.prompt_logprobs:
            reports = self._prompt_logprobs(step, hidden, query)
            if self._is_chooser:
                prompt_logprobs[query.request] = reports
        return StepLogits(logits=logits, prompt_logprobs=prompt_logprobs)

    def sample(self, step: StepInput, made: StepLogits | StageRun) -> PendingOutput:
        """Choose the step's new tokens; no rank waits for another here.

        Args:
            step: What `forward` got.
            made: What `compute` or `logits` returned.

        Returns:
            The output to come; on ranks other than 0, without tokens.
        """
        if isinstance(made, StageRun):
            self._newest = (step.step_id, made)
            return PendingOutput(step, made, {})
        sampling: Sampling | None = None
        if made.logits is not None and (self._is_chooser or self._decoder.is_first):
            # On a single stage every rank embeds the tokens that the next step may have pending. They are the same, as
            # the logits are to the last bit.
            draw_by = None if self._whole is None else self._whole.draw
            with torch.inference_mode():
                sampling = sample(
                    made.logits, self._with_known_histories(step), likeliest=made.likeliest, draw_by=draw_by
                )
            self._newest = (step.step_id, sampling.token_ids)
        return PendingOutput(step, sampling if self._is_chooser else None, made.prompt_logprobs)

    @property
    def _whole(self) -> DenseStage | None:
        # Whoever times attention has it computed by itself for a while.
        return self._joined if self._decoder.backend.is_in_layers else None

    def _sampled_before(self, step: StepInput) -> Tensor | StageRun | None:
        """Return the tokens of the step before, or what chooses them; None if it failed."""
        if self._newest is None or self._newest[0] != step.step_id - 1:
            return None
        return self._newest[1]

    def _tokens_before(self, step: StepInput) -> Tensor | None:
        """Return the tokens of the step before, None if it failed; the C++ kernels are waited for."""
        before = self._sampled_before(step)
        if isinstance(before, StageRun):
            before.wait()
            return torch.from_numpy(before.chosen)
        return before

    def _with_known_histories(self, step: StepInput) -> StepInput:
        """Return the step with its pending tokens in the histories; a device is waited for if there are any."""
        if not step.histories or step.pending is None or (sampled := self._tokens_before(step)) is None:
            return step
        tokens = sampled.cpu().numpy().astype(np.int32)[step.pending.samples]
        token_of = dict(zip(step.pending.positions.tolist(), tokens, strict=True))
        # A request whose token is pending is among the first, which have a token each.
        requests = step.sample_requests.tolist()
        return replace(
            step,
            histories=tuple(
                replace(history, output_token_ids=np.append(history.output_token_ids, token_of[requests[history.row]]))
                if requests[history.row] in token_of
                else history
                for history in step.histories
            ),
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


def _arrays(step: StepInput, wanted: Int32Array) -> StepArrays:
    # No operator of torch: each gives Python's lock away, and then waits for it.
    pending = step.pending
    return StepArrays(
        token_ids=step.token_ids,
        query_lens=step.query_lens,
        context_lens=step.context_lens,
        num_blocks=step.num_blocks,
        wanted=wanted,
        block_tables=step.block_tables,
        pending_positions=_NONE if pending is None else pending.positions,
        pending_samples=_NONE if pending is None else pending.samples,
    )


def _needs_logits(step: StepInput) -> bool:
    """Return whether choosing tokens takes more than the C++ kernels do."""
    return step.logit_bias is not None or bool(step.histories) or _is_any(step.sampling["has_logprobs"])


def _is_any(array: npt.NDArray[np.generic]) -> bool:
    # `any` takes 1 us, as it is a function in Python, and this 0.2.
    return len(array.nonzero()[0]) > 0


def _on_host(tokens: Tensor | None) -> Int32Array | None:
    return None if tokens is None else tokens.numpy().astype(np.int32)
