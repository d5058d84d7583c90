"""Offline generation: the whole engine in one process, judged by transformers."""

import asyncio
from pathlib import Path

import pytest
from torch import Tensor

from rayserve_sarathi import LLM, SamplingParams
from rayserve_sarathi.errors import ConfigError, ContextLengthError, InvalidRequestError
from rayserve_sarathi.execution.model_runner import ModelRunner, StepLogits
from rayserve_sarathi.kernels.layers import StageRun
from rayserve_sarathi.request import FinishReason
from rayserve_sarathi.scheduling import ahead
from rayserve_sarathi.step import StepInput
from tests.servable import Reference, save_servable

MAX_TOKENS = 20
PROMPTS = [[index + 5] * (3 * index % 17 + 1) + list(range(index, 2 * index + 4)) for index in range(16)]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_servable(tmp_path_factory.mktemp("servable"))


@pytest.fixture(scope="module")
def references(checkpoint: Path) -> list[list[int]]:
    reference = Reference(checkpoint)
    return [reference.generate(prompt, MAX_TOKENS) for prompt in PROMPTS]


@pytest.mark.parametrize("num_stages", [1, 2])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"scheduler": {"token_budget": 5}},
        {"scheduler": {"token_budget": 1, "max_num_seqs": 3}},
        {"block_size": 1, "scheduler": {"token_budget": 32}},
        {"enable_prefix_caching": False, "scheduler": {"token_budget": 7, "max_num_partial_prefills": 2}},
        {"tensor_parallel_size": 2},
    ],
    ids=["plain", "small-chunks", "budget-1", "block-size-1", "no-prefix-cache", "two-ranks"],
)
def test_greedy_tokens_are_those_of_transformers(
    checkpoint: Path, references: list[list[int]], num_stages: int, settings: dict
):
    with LLM(str(checkpoint), pipeline_parallel_size=num_stages, **settings) as llm:
        generations = llm.generate(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS, temperature=0))

    assert [list(generation.token_ids) for generation in generations] == references


@pytest.mark.parametrize("num_stages", [1, 2])
def test_greedy_tokens_survive_preemption(checkpoint: Path, references: list[list[int]], num_stages: int):
    # 16 blocks of 4 tokens hold one request of 64, so 16 requests of up to 60 preempt each other.
    settings = {"block_size": 4, "num_gpu_blocks_override": 16, "max_model_len": 64}
    with LLM(str(checkpoint), pipeline_parallel_size=num_stages, **settings) as llm:
        generations = llm.generate(PROMPTS, SamplingParams(max_tokens=MAX_TOKENS, temperature=0))
        metrics = llm.metrics()

    assert [list(generation.token_ids) for generation in generations] == references
    preemptions = next(line for line in metrics.splitlines() if line.startswith("sarathi_num_preemptions_total"))
    assert float(preemptions.split()[-1]) > 0


def test_a_seed_gives_the_same_tokens_alone_in_a_batch_in_chunks_and_over_stages(checkpoint: Path):
    sampling = [SamplingParams(max_tokens=12, temperature=0.8, top_p=0.95, seed=index) for index in range(len(PROMPTS))]
    runs = []
    for settings in (
        {},
        {"pipeline_parallel_size": 2, "scheduler": {"token_budget": 5}},
        {"block_size": 4, "num_gpu_blocks_override": 16, "max_model_len": 64},
    ):
        with LLM(str(checkpoint), **settings) as llm:
            runs.append([generation.token_ids for generation in llm.generate(PROMPTS, sampling)])
    with LLM(str(checkpoint)) as llm:
        alone = [llm.generate(prompt, one)[0].token_ids for prompt, one in zip(PROMPTS, sampling, strict=True)]

    assert runs[0] == runs[1] == runs[2] == alone
    assert len(set(alone)) > 10


VARIED = [
    SamplingParams(max_tokens=12, temperature=0),
    SamplingParams(max_tokens=12, temperature=0.9, top_k=20, seed=3),
    SamplingParams(max_tokens=12, temperature=0, frequency_penalty=1.5, presence_penalty=0.5, repetition_penalty=1.2),
    SamplingParams(max_tokens=12, temperature=0, min_tokens=6, stop_token_ids=tuple(range(40))),
    SamplingParams(max_tokens=12, temperature=0, stop_token_ids=tuple(range(40))),
    SamplingParams(max_tokens=5, temperature=0, logprobs=2, prompt_logprobs=1),
    SamplingParams(max_tokens=1, temperature=0.7, seed=1),
    SamplingParams(max_tokens=12, temperature=0, logit_bias=((17, 40.0),)),
]


@pytest.mark.parametrize("settings", [{}, {"tensor_parallel_size": 2}, {"scheduler": {"token_budget": 5}}])
@pytest.mark.parametrize("is_async", [False, True], ids=["cpu", "as-on-a-gpu"])
def test_steps_scheduled_ahead_change_nothing(
    checkpoint: Path, is_async: bool, settings: dict, monkeypatch: pytest.MonkeyPatch
):
    """With penalties, stops, least and most tokens, log-probabilities."""
    monkeypatch.setattr(ahead, "AHEAD_S", 3600)  # however slow this machine is
    sampling = [VARIED[index % len(VARIED)] for index in range(len(PROMPTS))]
    with LLM(str(checkpoint), async_scheduling=False, **settings) as llm:
        one_by_one = llm.generate(PROMPTS, sampling)
    # As if its tokens were not there yet, so that a stage launches the next step before it waits for them.
    monkeypatch.setattr(ModelRunner, "is_async", is_async)
    pending = count_pending(monkeypatch)
    with LLM(str(checkpoint), **settings) as llm:
        in_advance = llm.generate(PROMPTS, sampling)

    assert sum(pending) > 50
    assert [each.token_ids for each in in_advance] == [each.token_ids for each in one_by_one]
    assert [each.finish_reason for each in in_advance] == [each.finish_reason for each in one_by_one]
    for one, other in zip(in_advance, one_by_one, strict=True):
        for mine, theirs in zip(one.logprobs or (), other.logprobs or (), strict=True):
            assert mine.token_id == theirs.token_id
            assert mine.logprob == pytest.approx(theirs.logprob, abs=1e-4)


def count_pending(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Return a list that gets the number of pending tokens of each step that is computed."""
    counts: list[int] = []
    compute = ModelRunner.compute

    def count(runner: ModelRunner, step: StepInput, hidden: Tensor | None) -> Tensor | StepLogits | StageRun:
        counts.append(0 if step.pending is None else len(step.pending.positions))
        return compute(runner, step, hidden)

    monkeypatch.setattr(ModelRunner, "compute", count)
    return counts


def test_a_second_prompt_with_the_same_prefix_finds_it_in_the_cache(checkpoint: Path):
    prompt = list(range(40))
    with LLM(str(checkpoint)) as llm:
        first = llm.generate(prompt, SamplingParams(max_tokens=4, temperature=0))[0]
        second = llm.generate(prompt, SamplingParams(max_tokens=4, temperature=0))[0]

    assert (first.num_cached_tokens, second.num_cached_tokens) == (0, 32)
    assert first.token_ids == second.token_ids


def test_logprobs_of_prompt_and_output_add_up_over_chunks(checkpoint: Path):
    prompt = list(range(3, 25))
    results = []
    for token_budget in (512, 4):
        with LLM(str(checkpoint), scheduler={"token_budget": token_budget}) as llm:
            results.append(
                llm.generate(prompt, SamplingParams(max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=1))
            )
    (whole,), (chunked,) = results

    assert whole.logprobs is not None
    assert whole.prompt_logprobs is not None
    assert chunked.prompt_logprobs is not None
    assert [entry.token_id for entry in whole.logprobs] == list(whole.token_ids)
    assert all(entry.top_token_ids[0] == entry.token_id for entry in whole.logprobs)
    assert [entry.token_id for entry in chunked.prompt_logprobs] == prompt[1:]
    assert [entry.logprob for entry in chunked.prompt_logprobs] == pytest.approx(
        [entry.logprob for entry in whole.prompt_logprobs], abs=1e-4
    )


def test_text_and_chat(checkpoint: Path):
    with LLM(str(checkpoint)) as llm:
        texts = [generation.text for generation in llm.generate(["hello", "hello"], SamplingParams(temperature=0))]
        answer = llm.chat([{"role": "user", "content": "hello"}], SamplingParams(max_tokens=5, temperature=0))

    assert texts[0] == texts[1] != ""
    assert answer.finish_reason in (FinishReason.LENGTH, FinishReason.STOP)


def test_a_prompt_that_can_never_be_served_is_refused_and_the_engine_goes_on(checkpoint: Path):
    with LLM(str(checkpoint), max_model_len=64) as llm:
        with pytest.raises(ContextLengthError, match="maximum context length is 64 tokens"):
            llm.generate([[1] * 70, [1, 2]], SamplingParams(max_tokens=4))
        with pytest.raises(InvalidRequestError, match="empty"):
            llm.generate([[]])

        assert len(llm.generate([1, 2], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids) == 4


@pytest.mark.parametrize("prompt", [[2**31], [-1], [1.5], ["a", 1]])
def test_a_prompt_that_is_no_list_of_tokens_is_refused(checkpoint: Path, prompt: list):
    with LLM(str(checkpoint)) as llm, pytest.raises(InvalidRequestError, match=r"token ids|its part"):
        llm.generate([prompt])


def test_the_seed_of_the_engine_tells_equal_requests_apart_and_makes_runs_equal(checkpoint: Path):
    def sampled(seed: int) -> list[tuple[int, ...]]:
        with LLM(str(checkpoint), seed=seed) as llm:
            return [generation.token_ids for generation in llm.generate(["hello"] * 3, SamplingParams(max_tokens=12))]

    assert len(set(sampled(seed=0))) == 3
    assert sampled(seed=0) == sampled(seed=0)
    assert sampled(seed=0) != sampled(seed=7)


def test_it_works_inside_a_running_event_loop(checkpoint: Path):
    async def in_a_notebook() -> int:
        with LLM(str(checkpoint)) as llm:
            return len(llm.generate([1, 2, 3], SamplingParams(max_tokens=4, ignore_eos=True))[0].token_ids)

    assert asyncio.run(in_a_notebook()) == 4


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blok_size": 16}, "did you mean block_size"),
        ({"scheduler": {"policy": "sarahti"}}, r"unknown scheduler policy 'sarahti'; use one of .*'sarathi', 'vllm'"),
        ({"max_model_len": 100_000}, "exceeds"),
        ({"num_gpu_blocks_override": 2}, "room for 32 tokens"),
        ({"tensor_parallel_size": 3}, r"cannot be split over tensor_parallel_size=3; use one of \[1, 2, 4\]"),
    ],
)
def test_impossible_settings_name_what_would_do(checkpoint: Path, settings: dict, message: str):
    with pytest.raises(ConfigError, match=message):
        LLM(str(checkpoint), **settings)
