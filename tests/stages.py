"""Steps made by hand, and stages to run them on, with no scheduler around."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import allocate_kv_caches
from rayserve_sarathi.execution.model_runner import ModelRunner, StepLogits
from rayserve_sarathi.kernels.layers import StageRun
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import SAMPLING_DTYPE, PromptLogprobsQuery, StepInput, StepOutput, pack_sampling

ANY_PROMPT_LOGPROBS = PromptLogprobsQuery(request=0, num_logprobs=0, target_token_ids=np.zeros(1, dtype=np.int32))


@dataclass(frozen=True, slots=True, kw_only=True)
class Chunk:
    """One request's part of a step; it samples if it has `sampling`."""

    token_ids: Sequence[int]
    block_ids: Sequence[int]
    context_len: int = 0
    sampling: SamplingParams | None = None


def make_step(*chunks: Chunk, step_id: int = 0, **fields: Any) -> StepInput:
    """Pack chunks, those with a single token first, into a step."""

    def packed(values: Sequence[int]) -> np.ndarray:
        array = np.array(values, dtype=np.int32)
        array.flags.writeable = False  # as what Ray hands to an actor
        return array

    assert [len(chunk.token_ids) > 1 for chunk in chunks] == sorted(len(chunk.token_ids) > 1 for chunk in chunks)
    sampling = b"".join(pack_sampling(chunk.sampling) for chunk in chunks if chunk.sampling is not None)
    return StepInput(
        step_id=step_id,
        epoch=0,
        request_ids=tuple(f"request-{index}" for index in range(len(chunks))),
        token_ids=packed([token for chunk in chunks for token in chunk.token_ids]),
        query_lens=packed([len(chunk.token_ids) for chunk in chunks]),
        context_lens=packed([chunk.context_len for chunk in chunks]),
        block_tables=packed([block for chunk in chunks for block in chunk.block_ids]),
        num_blocks=packed([len(chunk.block_ids) for chunk in chunks]),
        sample_requests=packed([index for index, chunk in enumerate(chunks) if chunk.sampling is not None]),
        sampling=np.frombuffer(sampling, dtype=SAMPLING_DTYPE),
        **fields,
    )


def random_pools(decoder: Decoder, *, num_blocks: int, block_size: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return a KV cache that holds numbers already, the same ones each time."""
    pools = allocate_kv_caches(decoder, num_blocks=num_blocks, block_size=block_size)
    for pool in (cache for pair in pools for cache in pair):
        pool.normal_(generator=torch.Generator().manual_seed(1))
    return pools


class Stages:
    """All stages of a model in this process."""

    def __init__(self, model: Path | str, *, num_stages: int = 1, num_blocks: int = 40, **settings: Any) -> None:
        config = EngineConfig(model=str(model), pipeline_parallel_size=num_stages, device="cpu", **settings)
        info = resolve_model(config)
        self._decoders = [load_decoder(config, info, stage=stage) for stage in range(num_stages)]
        self._runners = [
            ModelRunner(decoder, num_blocks=num_blocks, block_size=config.block_size) for decoder in self._decoders
        ]

    def hidden(self, step: StepInput) -> torch.Tensor:
        """Run all stages and return the hidden states, [T, D]."""
        # Log probabilities of a prompt, whichever, need all of them; without, the last stage has the last ones alone.
        return self._forward(replace(step, prompt_logprobs=(ANY_PROMPT_LOGPROBS,)))

    def logits(self, step: StepInput) -> torch.Tensor:
        """Return the logits of each token of the step, [T, V]."""
        with torch.inference_mode():
            return self._decoders[-1].logits(self.hidden(step))

    def run(self, step: StepInput) -> StepOutput:
        """Run the step and sample."""
        made: torch.Tensor | StepLogits | StageRun | None = None
        for runner in self._runners:
            assert not isinstance(made, StepLogits | StageRun)
            made = runner.compute(step, made)
        assert isinstance(made, StepLogits | StageRun)
        return self._runners[-1].sample(step, made).wait()

    def _forward(self, step: StepInput) -> torch.Tensor:
        hidden = self._runners[0].forward(step, None)
        for runner in self._runners[1:]:
            hidden = runner.forward(step, hidden)
        return hidden
