"""Our logits equal those of transformers on random weights, however a prompt is cut up, batched or staged."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from tests.checkpoints import FAMILIES, VOCAB_SIZE, hf_logits, save_checkpoint
from tests.stages import Chunk, Stages, make_step

BLOCK_SIZE = 4
TOLERANCE = 1e-4


def tokens(count: int, seed: int = 0) -> list[int]:
    return torch.randint(VOCAB_SIZE, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert ours.dtype == torch.float32
    assert (ours - theirs).abs().max() < TOLERANCE


@pytest.fixture(scope="module", params=FAMILIES)
def checkpoint(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, PreTrainedModel]:
    folder = tmp_path_factory.mktemp(request.param)
    return folder, save_checkpoint(folder, request.param)


@pytest.fixture(scope="module")
def stages(checkpoint: tuple[Path, PreTrainedModel]) -> tuple[Stages, PreTrainedModel]:
    folder, theirs = checkpoint
    return Stages(folder, block_size=BLOCK_SIZE), theirs


def test_a_whole_prompt(stages: tuple[Stages, PreTrainedModel]) -> None:
    ours, theirs = stages
    prompt = tokens(40)

    logits = ours.logits(make_step(Chunk(token_ids=prompt, block_ids=range(10))))

    assert_close(logits, hf_logits(theirs, prompt))


@pytest.mark.parametrize("lens", [[1] * 12, [5, 7], [4, 7, 1]])
def test_a_prompt_in_chunks(stages: tuple[Stages, PreTrainedModel], lens: list[int]) -> None:
    ours, theirs = stages
    prompt = tokens(sum(lens))
    blocks = [7, 3, 5]

    logits = []
    for begin, length in zip([sum(lens[:index]) for index in range(len(lens))], lens, strict=True):
        end = begin + length
        logits.append(
            ours.logits(
                make_step(
                    Chunk(token_ids=prompt[begin:end], context_len=begin, block_ids=blocks[: -(-end // BLOCK_SIZE)])
                )
            )
        )

    assert_close(torch.cat(logits), hf_logits(theirs, prompt))


def test_decodes_and_chunks_of_many_lengths_in_one_step(stages: tuple[Stages, PreTrainedModel]) -> None:
    ours, theirs = stages
    requests = [tokens(length, seed=length) for length in (3, 39, 1, 9, 20, 12)]
    blocks = [[0], range(1, 11), [11], range(12, 15), range(15, 20), range(20, 23)]
    # The first four decode; the last two are in the middle of their prompts.
    computed = [2, 38, 0, 8, 13, 0]
    for request, ids, context_len in zip(requests, blocks, computed, strict=True):
        if context_len:
            ours.hidden(make_step(Chunk(token_ids=request[:context_len], block_ids=ids)))

    logits = ours.logits(
        make_step(
            *(
                Chunk(token_ids=request[context_len:], context_len=context_len, block_ids=ids)
                for request, ids, context_len in zip(requests, blocks, computed, strict=True)
            )
        )
    )

    expected = [hf_logits(theirs, request)[begin:] for request, begin in zip(requests, computed, strict=True)]
    assert_close(logits, torch.cat(expected))


def test_a_prefix_that_another_request_computed(stages: tuple[Stages, PreTrainedModel]) -> None:
    ours, theirs = stages
    prefix = tokens(8)
    first, second = prefix + tokens(5, seed=1), prefix + tokens(6, seed=2)
    ours.hidden(make_step(Chunk(token_ids=first, block_ids=[9, 4, 6, 2])))

    logits = ours.logits(make_step(Chunk(token_ids=second[8:], context_len=8, block_ids=[9, 4, 1, 3])))

    assert_close(logits, hf_logits(theirs, second)[8:])


def test_two_stages(checkpoint: tuple[Path, PreTrainedModel]) -> None:
    folder, theirs = checkpoint
    prompt = tokens(20)
    first, second = (
        Chunk(token_ids=prompt[:12], block_ids=[2, 0, 1]),
        Chunk(token_ids=prompt[12:], block_ids=[2, 0, 1, 5, 4]),
    )

    ours = Stages(folder, num_stages=2, block_size=BLOCK_SIZE)
    logits = [ours.logits(make_step(first)), ours.logits(make_step(replace(second, context_len=12)))]

    assert_close(torch.cat(logits), hf_logits(theirs, prompt))


def test_bfloat16_stays_near_float32(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "llama", initializer_range=0.1)
    prompt = tokens(20)

    logits = Stages(tmp_path, dtype="bfloat16").logits(make_step(Chunk(token_ids=prompt, block_ids=[0, 1])))

    assert (logits - hf_logits(theirs, prompt)).abs().mean() < 0.02
