"""A stage in one call of the C++ kernels computes what its layers compute one by one, to the same bits."""

import gc
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.model_runner import ModelRunner, StepLogits
from rayserve_sarathi.execution.sampler import NOT_FINITE
from rayserve_sarathi.kernels.attention.cpp import CppAttention
from rayserve_sarathi.kernels.layers import StageRun
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import LogitBias, PendingTokens, StepInput, StepOutput, TokenHistory
from tests.checkpoints import save_checkpoint
from tests.stages import ANY_PROMPT_LOGPROBS, Chunk
from tests.stages import make_step as packed

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler to build with")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = ["llama", "llama-biases", "llama3-tied", "mistral-window", "qwen2", "qwen2-yarn", "qwen3"]
STEPS = {
    "a decode": (1, ()),
    "decodes": (5, ()),
    "a chunk": (0, ((40, 0),)),
    "chunks and decodes": (3, ((2, 0), (33, 20), (17, 16))),
    "more tokens than parts are computed again of": (1, ((70, 0), (33, 20))),
}


class Apart(CppAttention):
    """The same kernels, a layer at a time."""

    is_in_layers = False


def load(folder: Path, family: str, *, stage: int = 0, num_stages: int = 1, is_apart: bool = False) -> ModelRunner:
    save_checkpoint(folder, family, **WIDE)
    config = EngineConfig(model=str(folder), device="cpu", pipeline_parallel_size=num_stages)
    wrap = (lambda backend: Apart()) if is_apart else (lambda backend: backend)
    decoder = load_decoder(config, resolve_model(config), stage=stage, wrap_backend=wrap)
    runner = ModelRunner(decoder, num_blocks=24, block_size=16)
    assert runner.is_joined != is_apart
    with torch.inference_mode():
        for pool in (cache for pair in runner.kv_caches for cache in pair):
            pool.normal_(generator=torch.Generator().manual_seed(1))
    return runner


def run(runner: ModelRunner, step: StepInput) -> StepOutput:
    made = runner.compute(step, None)
    assert isinstance(made, StepLogits | StageRun)
    return runner.sample(step, made).wait()


def compute(runner: ModelRunner, step: StepInput, hidden: Tensor | None = None) -> StageRun:
    """Return what a stage in one kernel makes of a step, done."""
    made = runner.compute(step, hidden)
    assert isinstance(made, StageRun)
    made.finish()
    return made


@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_the_same_bits(tmp_path: Path, family: str, num_threads: int) -> None:
    torch.set_num_threads(num_threads)
    try:
        for num_decodes, chunks in STEPS.values():
            step = make_step(num_decodes=num_decodes, decode_context=21, chunks=chunks, block_size=16, vocab_size=60)
            together, apart = (load(tmp_path, family, is_apart=is_apart) for is_apart in (False, True))
            ours, plain = compute(together, step), apart.compute(step, None)
            assert isinstance(plain, StepLogits) and plain.logits is not None
            assert torch.equal(torch.from_numpy(ours.out), plain.logits)
            assert ours.likeliest.tolist() == plain.logits.argmax(dim=-1).tolist()
            assert ours.chosen.tolist() == apart.sample(step, plain).wait().token_ids.tolist()
            for one, other in zip(together.kv_caches, apart.kv_caches, strict=True):
                assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
            # Without the head, and all tokens in place of the last ones.
            assert torch.equal(together.forward(step, None), apart.forward(step, None))
            whole = replace(step, prompt_logprobs=(ANY_PROMPT_LOGPROBS,))
            assert torch.equal(hidden := together.forward(whole, None), apart.forward(whole, None))
            assert len(hidden) == step.num_tokens
    finally:
        torch.set_num_threads(1)


def run_last(runner: ModelRunner, step: StepInput, hidden: Tensor) -> list[int]:
    made = runner.compute(step, hidden)
    assert isinstance(made, StepLogits | StageRun)
    return runner.sample(step, made).wait().token_ids.tolist()


def test_stages_compute_the_same_bits(tmp_path: Path) -> None:
    step = make_step(num_decodes=3, decode_context=21, chunks=((33, 20),), block_size=16, vocab_size=60)
    made = []
    for is_apart in (False, True):
        first, last = (load(tmp_path, "llama", stage=stage, num_stages=2, is_apart=is_apart) for stage in range(2))
        hidden = first.compute(step, None)
        assert isinstance(hidden, Tensor)
        before = hidden.clone()
        token_ids = run_last(last, step, hidden)
        assert torch.equal(hidden, before), "what a stage sends on is still its own"
        made.append((hidden, token_ids))

    assert torch.equal(made[0][0], made[1][0]) and made[0][1] == made[1][1]


def test_only_requests_that_sample_have_logits(tmp_path: Path) -> None:
    step = make_step(num_decodes=3, decode_context=21, chunks=((33, 20),), block_size=16, vocab_size=60)
    runner = load(tmp_path, "llama")
    everyone = compute(runner, step)
    requests = np.array([0, 2], dtype=np.int32)
    some = compute(runner, replace(step, sample_requests=requests, sampling=step.sampling[requests]))
    none = compute(runner, replace(step, sample_requests=requests[:0], sampling=step.sampling[:0]))

    np.testing.assert_allclose(some.out, everyone.out[[0, 2]], atol=1e-5, rtol=1e-5)
    assert len(none.out) == len(none.chosen) == 0


def test_likeliest_tokens_of_logits_that_are_not_finite_are_none(tmp_path: Path) -> None:
    runner = load(tmp_path, "llama")
    step = make_step(num_decodes=3, decode_context=21, chunks=(), block_size=16, vocab_size=60)
    _, values = runner.kv_caches[0]
    with torch.inference_mode():
        values[step.block_tables[step.num_blocks[0]]] = float("nan")  # of the second request

    made = compute(runner, step)

    assert [token < 0 for token in made.likeliest] == [False, True, False]
    assert made.chosen[1] == 0, "a token of the vocabulary, as a step may be launched that takes it"
    assert runner.sample(step, made).wait().errors == {1: NOT_FINITE}


@pytest.mark.parametrize("is_random", [False, True])
def test_biased_penalised_and_random_requests_get_the_same_tokens(tmp_path: Path, is_random: bool) -> None:
    """Where none is random, the likeliest tokens are known, but biases and penalties make them others."""
    sampling = [
        SamplingParams(temperature=0, repetition_penalty=100.0),
        SamplingParams(temperature=0),
        SamplingParams(temperature=0, logprobs=2),
        SamplingParams(temperature=float(is_random), seed=5),
    ]
    chunks = [Chunk(token_ids=[5 + i], block_ids=[i], sampling=each) for i, each in enumerate(sampling)]
    step = packed(*chunks)
    together, apart = (load(tmp_path, "llama", is_apart=is_apart) for is_apart in (False, True))
    plain = run(together, step)
    none = np.empty(0, dtype=np.int32)
    history = TokenHistory(row=0, prompt_token_ids=plain.token_ids[:1], output_token_ids=none)
    banned = {"token_ids": plain.token_ids[1:2], "values": np.array([-np.inf], dtype=np.float32)}
    bias = LogitBias(rows=np.array([1], dtype=np.int32), **banned)
    for fields in ({"histories": (history,)}, {"logit_bias": bias}, {"histories": (history,), "logit_bias": bias}):
        ours, theirs = (run(runner, replace(step, **fields)) for runner in (together, apart))
        assert ours.token_ids.tolist() == theirs.token_ids.tolist()
        assert ours.logprobs.keys() == theirs.logprobs.keys() == {2}
        assert (ours.token_ids[0] != plain.token_ids[0]) == ("histories" in fields)
        assert (ours.token_ids[1] != plain.token_ids[1]) == ("logit_bias" in fields)


def test_pending_tokens_are_those_of_the_step_before(tmp_path: Path) -> None:
    greedy = SamplingParams(temperature=0)
    runner = load(tmp_path, "llama")
    before = packed(*(Chunk(token_ids=[block], block_ids=[block], sampling=greedy) for block in (7, 8)))
    tokens = run(runner, before).token_ids.tolist()
    assert tokens[0] != tokens[1]

    def after(token_ids: list[int], pending: PendingTokens | None) -> StepInput:
        """The requests of the step before in the other order."""
        places = zip(token_ids, (8, 7), strict=True)
        chunks = [Chunk(token_ids=[t], block_ids=[b], context_len=1, sampling=greedy) for t, b in places]
        return packed(*chunks, step_id=before.step_id + 1, pending=pending)

    pending = PendingTokens(positions=np.array([0, 1], dtype=np.int32), samples=np.array([1, 0], dtype=np.int32))
    made = compute(runner, after([0, 0], pending))
    known = compute(runner, after(tokens[::-1], None))

    assert np.array_equal(made.out, known.out)


def decodes(*, step_id: int, context_len: int, pending: PendingTokens | None = None) -> StepInput:
    """Tokens of two requests, a greedy one and one that samples."""
    sampling = [SamplingParams(temperature=0), SamplingParams(temperature=1.0, seed=3)]
    chunks = [
        Chunk(token_ids=[7 + block], block_ids=[block], context_len=context_len, sampling=each)
        for block, each in enumerate(sampling)
    ]
    return packed(*chunks, step_id=step_id, pending=pending)


BOTH_PENDING = PendingTokens(positions=np.array([0, 1], dtype=np.int32), samples=np.array([0, 1], dtype=np.int32))


def test_steps_may_be_launched_before_the_ones_before_are_done(tmp_path: Path) -> None:
    """Their tokens are those of one step at a time, by layers one by one, also of requests that sample."""
    together, apart = (load(tmp_path, "llama", is_apart=is_apart) for is_apart in (False, True))
    steps = [decodes(step_id=i, context_len=i, pending=BOTH_PENDING if i else None) for i in range(8)]
    long = make_step(num_decodes=0, decode_context=0, chunks=((256, 0),), block_size=16, vocab_size=60, first_block=8)

    together.compute(long, None)  # keeps the stage busy while the others are launched
    outputs = []
    for step in steps:
        made = together.compute(step, None)
        assert isinstance(made, StageRun)
        outputs.append(together.sample(step, made))
    launched = [output.wait().token_ids.tolist() for output in outputs]

    assert launched == [run(apart, step).token_ids.tolist() for step in steps]
    assert len({tuple(tokens) for tokens in launched}) > 1


def test_a_step_that_fails_fails_no_other(tmp_path: Path) -> None:
    """A step launched behind it takes token 0 for those that are pending, and its own requests have failed too."""
    runner = load(tmp_path, "llama")
    wrong = replace(decodes(step_id=0, context_len=0), token_ids=np.array([0, 1_000_000], dtype=np.int32))
    after = decodes(step_id=1, context_len=0, pending=BOTH_PENDING)

    outputs = []
    for step in (wrong, after):
        made = runner.compute(step, None)
        assert isinstance(made, StageRun)
        outputs.append(runner.sample(step, made))

    with pytest.raises(IndexError, match="vocabulary"):
        outputs[0].wait()
    of_zeros = replace(after, token_ids=np.zeros(2, dtype=np.int32), pending=None)
    assert outputs[1].wait().token_ids.tolist() == run(runner, of_zeros).token_ids.tolist()


def test_parts_that_several_threads_compute_are_put_together_once(tmp_path: Path) -> None:
    """With many more threads than cores, some lose theirs within a part, which another one then does again."""
    steps = [make_step(num_decodes=n, decode_context=21, chunks=(), block_size=16, vocab_size=60) for n in (1, 5, 11)]
    alone = [compute(load(tmp_path, "llama"), step).out for step in steps]
    torch.set_num_threads(16)
    try:
        crowded = load(tmp_path, "llama")
    finally:
        torch.set_num_threads(1)

    for _ in range(300):
        for step, logits in zip(steps, alone, strict=True):
            assert np.array_equal(compute(crowded, step).out, logits)


def num_threads_of_this_process() -> int:
    return len(list(Path("/proc/self/task").iterdir()))


def test_a_stage_that_goes_does_what_was_launched_first(tmp_path: Path) -> None:
    num_before = num_threads_of_this_process()
    runner = load(tmp_path, "llama")
    launched = [runner.compute(decodes(step_id=i, context_len=0), None) for i in range(20)]
    assert num_threads_of_this_process() > num_before
    del runner
    gc.collect()

    assert num_threads_of_this_process() == num_before
    for made in launched:
        assert isinstance(made, StageRun)
        made.finish()
        assert made.is_done


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"token_ids": [0, -1]}, "vocabulary"),
        ({"token_ids": [0, 1_000_000]}, "vocabulary"),
        ({"context_lens": [3, 40]}, r"do not fit .*'context_lens': \[3, 40\]"),
        ({"context_lens": [3, -1]}, "do not fit"),
        ({"query_lens": [1, 2]}, "do not fit"),
        ({"query_lens": [2, 0]}, "do not fit"),
        ({"block_tables": [0]}, "do not fit"),
        ({"sample_requests": [0, 2]}, "out of bounds"),
    ],
)
def test_a_step_that_would_be_read_beyond_its_end_is_refused(
    tmp_path: Path, fields: dict[str, list[int]], message: str
) -> None:
    runner = load(tmp_path, "llama")
    step = make_step(num_decodes=2, decode_context=3, chunks=(), block_size=16, vocab_size=60)
    wrong = replace(step, **{name: np.array(values, dtype=np.int32) for name, values in fields.items()})

    with pytest.raises(IndexError, match=message):
        compute(runner, wrong)


@pytest.mark.parametrize(
    ("family", "settings"),
    [("falcon-7b", {"hidden_size": 64, "num_attention_heads": 4}), ("mixtral", WIDE)],
)
def test_layers_of_another_kind_are_computed_one_by_one(tmp_path: Path, family: str, settings: dict[str, int]) -> None:
    save_checkpoint(tmp_path, family, **settings)
    config = EngineConfig(model=str(tmp_path), device="cpu")

    decoder = load_decoder(config, resolve_model(config), stage=0)

    assert decoder.backend.is_in_layers
    assert not ModelRunner(decoder, num_blocks=4, block_size=16).is_joined
