"""A stage from message to message."""

from pathlib import Path

import numpy as np
import pytest
import torch

from rayserve_sarathi.execution.model_input import put_pending
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import PendingTokens, PromptLogprobsQuery, TokenHistory
from tests.checkpoints import hf_logits, save_checkpoint
from tests.stages import Chunk, Stages, make_step

PROMPT = [5, 9, 60, 33, 8, 21]
GREEDY = SamplingParams(temperature=0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(folder, "llama")
    return folder


def history(output_token_ids: list[int], *, row: int) -> TokenHistory:
    prompt, output = (np.array(token_ids, dtype=np.int32) for token_ids in (PROMPT, output_token_ids))
    return TokenHistory(row=row, prompt_token_ids=prompt, output_token_ids=output)


def generate(stages: Stages, sampling: SamplingParams, lens: list[int], num_tokens: int) -> list[int]:
    """Compute the prompt in chunks, then decode."""
    known, done = list(PROMPT), 0
    while len(known) < len(PROMPT) + num_tokens:
        length = lens.pop(0) if lens else 1
        is_sampling = done + length == len(known)
        output = stages.run(
            make_step(
                Chunk(
                    token_ids=known[done : done + length],
                    context_len=done,
                    block_ids=[3, 1],
                    sampling=sampling if is_sampling else None,
                ),
                histories=(history(known[len(PROMPT) :], row=0),) if is_sampling and sampling.has_penalties else (),
            )
        )
        done += length
        known += output.token_ids.tolist()
    return known[len(PROMPT) :]


def test_greedy_tokens_are_those_of_transformers(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "llama")
    expected = list(PROMPT)
    for _ in range(8):
        expected.append(int(hf_logits(theirs, expected)[-1].argmax()))

    assert generate(Stages(tmp_path), GREEDY, [len(PROMPT)], 8) == expected[len(PROMPT) :]


def test_chunking_and_stages_do_not_change_sampled_tokens(folder: Path) -> None:
    sampling = SamplingParams(seed=11, top_p=0.9)
    whole = generate(Stages(folder), sampling, [6], 12)

    assert len(set(whole)) > 3
    assert generate(Stages(folder), sampling, [2, 3, 1], 12) == whole
    assert generate(Stages(folder, num_stages=3), sampling, [4, 2], 12) == whole


def test_dummy_weights_do_not_depend_on_the_number_of_stages(folder: Path) -> None:
    step = make_step(Chunk(token_ids=PROMPT, block_ids=[0]))
    one, three, other = (
        Stages(folder, num_stages=num_stages, load_format="dummy", seed=seed).logits(step)
        for num_stages, seed in ((1, 0), (3, 0), (1, 1))
    )

    assert torch.equal(one, three)
    assert not torch.allclose(one, other, atol=0.1)
    assert one.std() > 0.1


def test_a_step_that_samples_nothing_returns_no_tokens(folder: Path) -> None:
    output = Stages(folder).run(make_step(Chunk(token_ids=PROMPT, block_ids=[0]), step_id=4))

    assert (output.step_id, output.epoch, len(output.token_ids), output.fault) == (4, 0, 0, None)


def test_only_sampling_requests_get_tokens(folder: Path) -> None:
    stages = Stages(folder)
    step = make_step(
        Chunk(token_ids=[7], block_ids=[0], sampling=GREEDY),
        Chunk(token_ids=PROMPT, block_ids=[1]),
        Chunk(token_ids=PROMPT[:4], block_ids=[2], sampling=GREEDY),
    )

    logits = stages.logits(step)

    assert stages.run(step).token_ids.tolist() == [int(logits[0].argmax()), int(logits[10].argmax())]


@pytest.mark.parametrize("length", [5, 200])
def test_prompt_logprobs(tmp_path: Path, length: int) -> None:
    theirs = save_checkpoint(tmp_path, "llama", max_position_embeddings=256)
    prompt = [(7 * index) % 90 for index in range(length)]
    query = PromptLogprobsQuery(request=1, num_logprobs=2, target_token_ids=np.array(prompt[1:], np.int32))

    output = Stages(tmp_path).run(
        make_step(
            Chunk(token_ids=[3], block_ids=[20], sampling=GREEDY),
            Chunk(token_ids=prompt, block_ids=range(13)),
            prompt_logprobs=(query,),
        )
    )

    expected = hf_logits(theirs, prompt).log_softmax(-1)
    reports = output.prompt_logprobs[1]
    assert [report.token_id for report in reports] == prompt[1:]
    for position, report in enumerate(reports):
        top = expected[position].topk(2)
        assert report.logprob == pytest.approx(expected[position, report.token_id].item(), abs=1e-4)
        assert report.top_logprobs == pytest.approx(top.values.tolist(), abs=1e-4)


def test_what_an_earlier_request_left_in_a_block_does_not_matter(folder: Path) -> None:
    stages = Stages(folder)
    step = make_step(Chunk(token_ids=PROMPT, block_ids=[5]))
    clean = stages.logits(step)
    stages.hidden(make_step(Chunk(token_ids=list(range(16)), block_ids=[5])))

    assert torch.equal(stages.logits(step), clean)


def decode_ahead(stages: Stages, sampling: SamplingParams, num_tokens: int) -> list[int]:
    """Like `generate`, each decode made up before its token is known."""
    step = make_step(Chunk(token_ids=PROMPT, block_ids=[3, 1], sampling=sampling))
    known = stages.run(step).token_ids.tolist()
    for number in range(1, num_tokens):
        step = make_step(
            # Another request, whose token is known and means nothing, has the first row.
            Chunk(token_ids=[1], context_len=0, block_ids=[7], sampling=GREEDY),
            Chunk(token_ids=[0], context_len=len(PROMPT) + number - 1, block_ids=[3, 1], sampling=sampling),
            step_id=number,
            pending=PendingTokens(
                positions=np.array([1], dtype=np.int32), samples=np.array([min(number - 1, 1)], dtype=np.int32)
            ),
            histories=(history(known[:-1], row=1),) if sampling.has_penalties else (),
        )
        known.append(int(stages.run(step).token_ids[1]))
    return known


@pytest.mark.parametrize(
    "sampling",
    [GREEDY, SamplingParams(seed=11, top_p=0.9), SamplingParams(temperature=0, frequency_penalty=2.0)],
    ids=["greedy", "drawn", "penalised"],
)
def test_tokens_that_are_pending_are_those_of_the_step_before(folder: Path, sampling: SamplingParams) -> None:
    expected = generate(Stages(folder), sampling, [len(PROMPT)], 8)

    assert decode_ahead(Stages(folder), sampling, 8) == expected


def test_after_a_step_that_failed_what_was_pending_spoils_nothing(folder: Path) -> None:
    stages = Stages(folder)
    pending = PendingTokens(positions=np.array([0], dtype=np.int32), samples=np.array([0], dtype=np.int32))
    step = make_step(
        Chunk(token_ids=[0], context_len=6, block_ids=[3, 1], sampling=GREEDY),
        Chunk(token_ids=PROMPT, block_ids=[4, 2], sampling=GREEDY),
        step_id=9,
        pending=pending,
    )

    assert stages.run(step).token_ids[1] == generate(Stages(folder), GREEDY, [len(PROMPT)], 1)[0]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_pending_tokens_are_put_where_they_belong(dtype: torch.dtype) -> None:
    """As in the fixed tensors of a CUDA graph, and in those of a step without one."""
    token_ids = torch.tensor([1, 2, 3, 4], dtype=dtype)
    pending = PendingTokens(positions=np.array([0, 2], dtype=np.int32), samples=np.array([1, 0], dtype=np.int32))

    put_pending(token_ids, pending, torch.tensor([50, 60]))
    assert token_ids.tolist() == [60, 2, 50, 4]
    put_pending(token_ids, pending, None)
    assert token_ids.tolist() == [0, 2, 0, 4]
