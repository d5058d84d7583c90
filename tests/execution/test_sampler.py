"""The sampler against brute force in numpy, row by row."""

from typing import Any

import numpy as np
import pytest
import torch

from rayserve_sarathi.execution.sampler import sample
from rayserve_sarathi.execution.uniform import uniforms
from rayserve_sarathi.request import MIN_REPETITION_PENALTY, SamplingParams
from rayserve_sarathi.step import Int32Array, LogitBias, StepInput, TokenHistory
from tests.stages import Chunk, make_step

VOCAB_SIZE = 600
CONTEXT_LEN = 9


def step_of(*params: SamplingParams, context_len: int = CONTEXT_LEN, **fields: Any) -> StepInput:
    """Return a step in which each of these requests decodes one token."""
    chunks = (Chunk(token_ids=[1], block_ids=[0], context_len=context_len, sampling=sampling) for sampling in params)
    return make_step(*chunks, **fields)


def tokens(logits: torch.Tensor, step: StepInput) -> Int32Array:
    """Return what is sampled."""
    return sample(logits, step).wait().token_ids


def random_logits(num_rows: int, vocab_size: int = VOCAB_SIZE, scale: float = 2.0) -> torch.Tensor:
    return torch.randn(num_rows, vocab_size, generator=torch.Generator().manual_seed(1)) * scale


def brute_force(logits: np.ndarray, sampling: SamplingParams, position: int) -> int:
    """Follow the definitions in float64, over the sorted vocabulary."""
    logits = logits.astype(np.float64) / sampling.temperature
    order = np.argsort(-logits, kind="stable")
    probabilities = np.exp(logits - logits.max())
    if sampling.top_k:
        probabilities[order[sampling.top_k :]] = 0
    probabilities /= probabilities.sum()
    mass_before = np.cumsum(probabilities[order]) - probabilities[order]
    probabilities[order[mass_before >= sampling.top_p]] = 0
    probabilities[probabilities < sampling.min_p * probabilities.max()] = 0
    cdf = np.cumsum(probabilities)
    u = uniforms(np.array([sampling.seed or 0], np.uint64), np.array([position]))[0]
    return int(np.searchsorted(cdf, u * cdf[-1], side="right"))


PARAMS = {
    "plain": {},
    "cold": {"temperature": 0.3},
    "hot": {"temperature": 3.0},
    "top_k": {"top_k": 7},
    "top_k-1": {"top_k": 1},
    "top_k-of-all": {"top_k": VOCAB_SIZE + 5},
    "top_k-past-the-candidates": {"top_k": 550, "temperature": 5.0},
    "top_p": {"top_p": 0.6},
    "top_p-tiny": {"top_p": 1e-6},
    "top_p-past-the-candidates": {"top_p": 0.99, "temperature": 20.0},
    "min_p": {"min_p": 0.1},
    "all": {"temperature": 0.8, "top_k": 50, "top_p": 0.8, "min_p": 0.02},
}


@pytest.mark.parametrize("params", PARAMS.values(), ids=PARAMS)
def test_it_draws_what_brute_force_draws(params: dict[str, Any]) -> None:
    logits = random_logits(200)
    samplings = [SamplingParams(seed=seed, **params) for seed in range(200)]

    token_ids = tokens(logits.clone(), step_of(*samplings))

    expected = [
        brute_force(row, params, CONTEXT_LEN + 1) for row, params in zip(logits.numpy(), samplings, strict=True)
    ]
    assert token_ids.tolist() == expected


def test_rows_of_a_batch_do_not_see_each_other() -> None:
    logits = random_logits(len(PARAMS) + 1)
    samplings = [SamplingParams(seed=3, **params) for params in PARAMS.values()] + [SamplingParams(temperature=0)]

    together = tokens(logits.clone(), step_of(*samplings))
    alone = [tokens(logits[[row]].clone(), step_of(samplings[row]))[0] for row in range(len(samplings))]

    assert together.tolist() == alone


def test_frequencies_follow_the_probabilities() -> None:
    logits = torch.tensor([[0.0, 1.0, 2.0, -torch.inf]]).repeat(20000, 1)

    token_ids = tokens(logits, step_of(*(SamplingParams(seed=seed) for seed in range(20000))))

    expected = np.exp([0, 1, 2]) / np.exp([0, 1, 2]).sum()
    counts = np.bincount(token_ids, minlength=4)
    assert counts[3] == 0
    assert np.abs(counts[:3] / 20000 - expected).max() < 0.01


def test_a_seed_gives_other_tokens_at_other_positions() -> None:
    drawn = {tokens(random_logits(1), step_of(SamplingParams(seed=5), context_len=n))[0] for n in range(20)}

    assert len(drawn) > 10


def test_greedy_takes_the_largest_logit_and_the_first_of_equals() -> None:
    logits = torch.zeros(2, VOCAB_SIZE)
    logits[0, [40, 400]] = 1.0

    token_ids, logprobs, _ = sample(logits, step_of(*[SamplingParams(temperature=0)] * 2)).wait()

    assert token_ids.dtype == np.int32
    assert (token_ids.tolist(), logprobs) == ([40, 0], {})


def test_a_tiny_temperature_is_greedy_and_not_nan() -> None:
    logits = random_logits(3)

    token_ids = tokens(logits.clone(), step_of(*[SamplingParams(temperature=1e-30)] * 3))

    assert token_ids.tolist() == logits.argmax(-1).tolist()


def test_equal_logits_are_kept_or_dropped_together() -> None:
    logits = torch.zeros(500, VOCAB_SIZE)
    logits[:, :3] = 5.0

    token_ids = tokens(logits, step_of(*(SamplingParams(seed=seed, top_k=2) for seed in range(500))))

    assert set(token_ids.tolist()) == {0, 1, 2}


def test_penalties() -> None:
    logits = torch.tensor([[4.0, 4.0, 4.0, -4.0, 1.0], [4.0, 4.0, 4.0, -4.0, 1.0]])
    logits = torch.nn.functional.pad(logits, (0, 3), value=-9.0)
    greedy = SamplingParams(
        temperature=0, presence_penalty=0.5, frequency_penalty=0.25, repetition_penalty=2.0, logprobs=0
    )
    history = TokenHistory(
        row=1,
        prompt_token_ids=np.array([0, 3, 3], np.int32),
        output_token_ids=np.array([1, 4, 1], np.int32),
    )

    token_ids = tokens(logits, step_of(SamplingParams(temperature=0), greedy, histories=(history,)))

    # Token 0 was in the prompt: halved. Token 1 twice in the output: halved, less 0.5 and 2 * 0.25.
    # Token 3 is negative, so doubled. Token 4: halved, less 0.5 and 0.25.
    assert logits[0, :5].tolist() == [4.0, 4.0, 4.0, -4.0, 1.0]
    assert logits[1, :5].tolist() == [2.0, 1.0, 4.0, -8.0, -0.25]
    assert token_ids.tolist() == [0, 2]


def test_biases_and_bans() -> None:
    logits = random_logits(2)
    first = int(logits[0].argmax())
    bias = LogitBias(
        rows=np.array([0, 1, 1], np.int32),
        token_ids=np.array([first, 17, 17], np.int32),
        values=np.array([-np.inf, 60.0, 40.0], np.float32),
    )

    token_ids = tokens(logits.clone(), step_of(*[SamplingParams(temperature=0)] * 2, logit_bias=bias))

    assert token_ids.tolist() == [int(logits[0].topk(2).indices[1]), 17]


def test_logprobs_are_those_of_the_model_before_any_change() -> None:
    logits = random_logits(3)
    raw = logits.log_softmax(-1)
    samplings = [SamplingParams(temperature=0), SamplingParams(logprobs=0), SamplingParams(logprobs=4, temperature=2)]
    bias = LogitBias(
        rows=np.array([2], np.int32), token_ids=np.array([3], np.int32), values=np.array([100], np.float32)
    )

    token_ids, logprobs, _ = sample(logits, step_of(*samplings, logit_bias=bias)).wait()

    assert token_ids[2] == 3
    assert logprobs.keys() == {1, 2}
    for row, count in ((1, 0), (2, 4)):
        top = raw[row].topk(count)
        assert logprobs[row].token_id == token_ids[row]
        assert logprobs[row].logprob == pytest.approx(raw[row, token_ids[row]].item(), abs=1e-6)
        assert logprobs[row].top_token_ids == tuple(top.indices.tolist())
        assert logprobs[row].top_logprobs == pytest.approx(top.values.tolist(), abs=1e-6)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_logits_of_one_request_are_named_and_spoil_no_other(bad: float) -> None:
    logits = random_logits(3)
    fine = tokens(logits.clone(), step_of(*[SamplingParams(seed=seed) for seed in range(3)]))
    logits[1, 5] = bad

    token_ids, _, bad_rows = sample(logits, step_of(*[SamplingParams(seed=seed) for seed in range(3)])).wait()

    assert bad_rows.tolist() == [1]
    assert token_ids[[0, 2]].tolist() == fine[[0, 2]].tolist()


@pytest.mark.parametrize("penalty", [MIN_REPETITION_PENALTY, 100.0])
def test_no_penalty_makes_logits_that_cannot_be_sampled(penalty: float) -> None:
    samplings = [SamplingParams(repetition_penalty=penalty, temperature=temperature) for temperature in (0, 1e-3, 1)]
    everything = np.arange(VOCAB_SIZE, dtype=np.int32)
    histories = tuple(
        TokenHistory(row=row, prompt_token_ids=everything, output_token_ids=everything[:3]) for row in range(3)
    )

    _, _, bad_rows = sample(random_logits(3, scale=1e37), step_of(*samplings, histories=histories)).wait()

    assert not len(bad_rows)
