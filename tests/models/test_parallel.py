"""A model split over ranks and stages gives what a single process gives, and ranks fail together."""

import asyncio
import socket
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed import HashStore, Work
from torch.distributed.distributed_c10d import Store

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError, EngineDeadError
from rayserve_sarathi.execution.inline import InlinePipeline, make_inline_pipeline
from rayserve_sarathi.execution.model_runner import ModelRunner
from rayserve_sarathi.execution.stage import Stage, StageMessage
from rayserve_sarathi.models.parallel import TensorParallel, join
from rayserve_sarathi.models.process_group import find_store, open_store
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.step import LogitBias, PromptLogprobsQuery, StepFault, StepInput, StepOutput
from tests.checkpoints import save_checkpoint
from tests.stages import Chunk, make_step

CPU = torch.device("cpu")
TIMEOUT_S = 60.0
PROMPT = [5, 9, 60, 33, 8, 21, 96, 40, 2, 77]
NUM_TOKENS = 5
GREEDY = SamplingParams(temperature=0, logprobs=3)
# Vocabularies of 97 tokens, which no number of ranks divides; 4 query and 2 KV heads, so that 4 ranks repeat them.
FAMILIES = [
    "llama",
    "llama-biases",
    "llama3-tied",
    "mistral-window",
    "qwen2",
    "qwen3",
    "falcon-7b-biases",
    "falcon-40b",
    "falcon-sequential",
    "mixtral",
]
GRID = [(2, 1), (1, 2), (2, 2), (4, 1), (1, 4)]


@dataclass(frozen=True, slots=True, kw_only=True)
class Generated:
    """What came of `PROMPT`: tokens, and log-probabilities of it and of them."""

    token_ids: list[int]
    logprobs: torch.Tensor


def make_config(folder: Path, *, tp_size: int, num_stages: int = 1, **settings: Any) -> EngineConfig:
    return EngineConfig(
        model=str(folder),
        device="cpu",
        block_size=4,
        tensor_parallel_size=tp_size,
        pipeline_parallel_size=num_stages,
        step_timeout_s=TIMEOUT_S,
        **{"num_gpu_blocks_override": 32, **settings},
    )


def generate(folder: Path, *, tp_size: int, num_stages: int, **settings: Any) -> Generated:
    """Compute the prompt in two chunks, the second beside another request, then decode both greedily."""
    config = make_config(folder, tp_size=tp_size, num_stages=num_stages, **settings)

    async def run() -> Generated:
        pipeline, _ = make_inline_pipeline(config)
        known, other = list(PROMPT), [7]
        query = PromptLogprobsQuery(request=0, num_logprobs=2, target_token_ids=np.array(PROMPT[1:8], np.int32))
        first = await run_step(
            pipeline, make_step(Chunk(token_ids=PROMPT[:7], block_ids=[3, 9]), prompt_logprobs=(query,))
        )
        reports = list(first.prompt_logprobs[0])
        chunks = [
            Chunk(token_ids=other, block_ids=[1, 2], sampling=GREEDY),
            Chunk(token_ids=PROMPT[7:], context_len=7, block_ids=[3, 9, 0, 4], sampling=GREEDY),
        ]
        for _ in range(NUM_TOKENS):
            output = await run_step(pipeline, make_step(*chunks))
            reports += [output.logprobs[0], output.logprobs[1]]
            for tokens, token_id in zip((other, known), output.token_ids.tolist(), strict=True):
                tokens.append(token_id)
            chunks = [
                Chunk(token_ids=tokens[-1:], context_len=len(tokens) - 1, block_ids=ids, sampling=GREEDY)
                for tokens, ids in ((other, [1, 2]), (known, [3, 9, 0, 4]))
            ]
        await pipeline.close()
        return Generated(
            token_ids=known + other,
            logprobs=torch.tensor([number for report in reports for number in (report.logprob, *report.top_logprobs)]),
        )

    return asyncio.run(run())


async def run_step(pipeline: InlinePipeline, step: StepInput) -> StepOutput:
    await pipeline.submit(step)
    output = await pipeline.receive()
    assert output.fault is None
    return output


def join_rank(store: Store, tp_rank: int, tp_size: int, *, meeting_timeout_s: float = TIMEOUT_S) -> TensorParallel:
    return join(
        store,
        tp_rank=tp_rank,
        tp_size=tp_size,
        meeting_timeout_s=meeting_timeout_s,
        timeout_s=TIMEOUT_S,
        device=CPU,
    )


def in_threads(tp_size: int) -> list[TensorParallel]:
    """Return connected ranks."""
    store = HashStore()
    with ThreadPoolExecutor(tp_size) as threads:
        return list(threads.map(lambda rank: join_rank(store, rank, tp_size), range(tp_size)))


@pytest.fixture(scope="module", params=FAMILIES)
def whole(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Generated]:
    folder = tmp_path_factory.mktemp(request.param)
    save_checkpoint(folder, request.param, num_hidden_layers=4)
    return folder, generate(folder, tp_size=1, num_stages=1)


@pytest.mark.parametrize(("tp_size", "num_stages"), GRID)
def test_ranks_and_stages_give_what_one_process_gives(
    whole: tuple[Path, Generated], tp_size: int, num_stages: int
) -> None:
    folder, expected = whole

    generated = generate(folder, tp_size=tp_size, num_stages=num_stages)

    assert generated.token_ids == expected.token_ids
    assert (generated.logprobs - expected.logprobs).abs().max() < 1e-4


@pytest.mark.parametrize("family", ["llama-biases", "falcon-40b", "mixtral"])
def test_dummy_weights_do_not_depend_on_ranks_and_stages(family: str, tmp_path: Path) -> None:
    save_checkpoint(tmp_path, family, num_hidden_layers=4)
    runs = [
        generate(tmp_path, tp_size=tp_size, num_stages=num_stages, load_format="dummy", seed=3)
        for tp_size, num_stages in [(1, 1), *GRID]
    ]

    for run in runs[1:]:
        assert run.token_ids == runs[0].token_ids
        assert (run.logprobs - runs[0].logprobs).abs().max() < 1e-4


def test_ranks_hold_a_part_of_the_kv_cache(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    num_blocks = []
    for tp_size in (1, 2, 4):
        config = make_config(tmp_path, tp_size=tp_size, num_gpu_blocks_override=None, kv_cache_memory_bytes=1536 * 1024)
        with ThreadPoolExecutor(tp_size) as threads:
            stages = [Stage(config, index=0, tp=tp) for tp in in_threads(tp_size)]
            list(threads.map(Stage.load, stages))
            num_blocks.append(min(threads.map(Stage.fit, stages)))

    # With 2 KV heads, 4 ranks have one each as 2 do.
    assert num_blocks[1] == num_blocks[2] == 2 * num_blocks[0]


def test_ranks_meet_at_a_port_and_add_up() -> None:
    meeting = open_store("127.0.0.1", timeout_s=TIMEOUT_S)

    def work(tp_rank: int) -> tuple[list[float], list[float]]:
        store = meeting if tp_rank == 0 else find_store("127.0.0.1", meeting.port, timeout_s=TIMEOUT_S)
        tp = join_rank(store, tp_rank, 3)
        total = tp.all_reduce(torch.tensor([1.0, 10.0]) * (tp_rank + 1))
        return total.tolist(), tp.all_gather(torch.tensor([[tp_rank, -tp_rank]]))[0].tolist()

    with ThreadPoolExecutor(3) as threads:
        assert list(threads.map(work, range(3))) == [([6.0, 60.0], [0, 0, 1, -1, 2, -2])] * 3


def test_meetings_at_the_same_time_have_ports_of_their_own() -> None:
    stores = [open_store("127.0.0.1", timeout_s=TIMEOUT_S) for _ in range(8)]

    assert len({store.port for store in stores}) == 8


def test_a_meeting_that_is_not_there_is_an_error_that_names_its_port() -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        with pytest.raises(EngineDeadError, match=f"there is nobody to meet at 127.0.0.1:{port}"):
            find_store("127.0.0.1", port, timeout_s=0.5)


def test_a_rank_that_waits_in_vain_says_so() -> None:
    with pytest.raises(EngineDeadError, match="rank 0 did not meet the others within"):
        join_rank(HashStore(), 0, 2, meeting_timeout_s=0.1)


def test_a_rank_that_leaves_fails_the_others_at_once() -> None:
    first, second = in_threads(2)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(first.all_reduce, torch.ones(4))
        second.close()

        with pytest.raises(EngineDeadError, match=r"rank 0 lost the others: .*(closed|reset)"):
            waiting.result()
    with pytest.raises(EngineDeadError, match="has left its group"):
        first.all_reduce(torch.ones(4))


class BrokenGroup:
    """As NCCL once its communicator is gone: a collective does not even begin."""

    is_aborted = False

    def allreduce(self, tensors: list[torch.Tensor]) -> Work:
        raise RuntimeError("NCCL communicator was aborted\nand more")

    def allgather(self, output_tensors: list[list[torch.Tensor]], input_tensors: list[torch.Tensor]) -> Work:
        raise RuntimeError("NCCL communicator was aborted\nand more")

    def send(self, tensors: list[torch.Tensor], dst_rank: int, tag: int) -> Work:
        raise AssertionError

    def recv(self, tensors: list[torch.Tensor], src_rank: int, tag: int) -> Work:
        raise AssertionError

    def abort(self) -> None:
        self.is_aborted = True


def test_a_collective_that_does_not_even_begin_says_so() -> None:
    group = BrokenGroup()
    tp = TensorParallel(tp_rank=0, tp_size=2, group=group)

    with pytest.raises(EngineDeadError, match=r"rank 0 lost the others: NCCL communicator was aborted$"):
        tp.all_gather(torch.ones(4))
    assert group.is_aborted


async def test_a_step_that_fails_on_one_rank_fails_on_all_and_the_pipeline_is_dead(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    config = make_config(tmp_path, tp_size=2)
    ranks = [[Stage(config, index=0, tp=tp)] for tp in in_threads(2)]
    for (stage,), num_blocks in zip(ranks, (32, 3), strict=True):
        stage.load()
        stage.start(num_blocks)
    pipeline = InlinePipeline(ranks, step_timeout_s=TIMEOUT_S)
    await run_step(pipeline, make_step(Chunk(token_ids=PROMPT, block_ids=[0, 1, 2])))

    # Rank 1 has no block 20.
    await pipeline.submit(make_step(Chunk(token_ids=PROMPT, block_ids=[0, 1, 20])))
    fault = (await pipeline.receive()).fault
    await pipeline.close()

    assert fault is not None and fault.is_stage_broken
    # Not that of rank 0, which has only lost rank 1.
    assert fault.message == "stage 0, rank 1 failed with IndexError"


async def test_a_step_that_cannot_be_sampled_fails_alone_and_the_ranks_go_on(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    pipeline, _ = make_inline_pipeline(make_config(tmp_path, tp_size=2, num_stages=2))
    chunk = Chunk(token_ids=PROMPT, block_ids=[0, 1, 2], sampling=GREEDY)
    no_token = LogitBias(
        rows=np.zeros(1, np.int32), token_ids=np.array([10**6], np.int32), values=np.ones(1, np.float32)
    )

    await pipeline.submit(make_step(chunk, logit_bias=no_token))
    fault = (await pipeline.receive()).fault

    assert fault is not None and not fault.is_stage_broken
    assert fault.message == "stage 1, rank 0 failed with IndexError"
    assert len((await run_step(pipeline, make_step(chunk))).token_ids) == 1
    await pipeline.close()


def test_after_an_error_of_the_device_the_stage_is_broken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.AcceleratorError("an illegal memory access was encountered")

    save_checkpoint(tmp_path, "llama")
    stage = Stage(make_config(tmp_path, tp_size=1), index=0)
    stage.load()
    stage.start(32)
    monkeypatch.setattr(ModelRunner, "compute", fail)
    failed = stage.execute_first(make_step(Chunk(token_ids=PROMPT, block_ids=[0, 1, 2], sampling=GREEDY)))

    assert failed.fault is not None and failed.fault.is_stage_broken
    assert failed.fault.message == "stage 0 failed with AcceleratorError"


def test_an_error_of_an_earlier_stage_on_one_rank_fails_the_step_on_the_others(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    config = make_config(tmp_path, tp_size=2)
    left: list[str] = []
    first, second = (
        Stage(config, index=0, tp=tp, on_leave=lambda name=name: left.append(name))  # type: ignore[misc]  # mypy knows no defaults of lambdas
        for name, tp in zip(("first", "second"), in_threads(2), strict=True)
    )
    step = make_step(Chunk(token_ids=PROMPT, block_ids=[0, 1, 2], sampling=GREEDY))
    for stage in (first, second):
        stage.load()
        stage.start(32)
    with ThreadPoolExecutor(1) as threads:
        waiting = threads.submit(first.execute_first, step)
        earlier = StepFault(message="an earlier stage failed", stage=0, is_stage_broken=True)
        passed_on = second.execute(StageMessage(step=step, fault=earlier))
        failed = waiting.result()

    assert isinstance(passed_on, StepOutput) and passed_on.fault == earlier
    assert isinstance(failed, StepOutput) and failed.fault is not None
    assert failed.fault.message == "stage 0, rank 0 lost another rank of its stage; the logs of the other ranks say why"
    assert sorted(left) == ["first", "second"]


async def test_logits_that_are_not_finite_fail_their_request_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.embed_tokens.weight"][70] = torch.nan
    save_file(tensors, tmp_path / "model.safetensors")
    pipeline, _ = make_inline_pipeline(make_config(tmp_path, tp_size=2, num_stages=2))
    query = PromptLogprobsQuery(request=0, num_logprobs=1, target_token_ids=np.array(PROMPT[1:], np.int32))

    def step(token_id: int) -> StepInput:
        chunk = Chunk(token_ids=[*PROMPT, token_id], block_ids=[0, 1, 2], sampling=GREEDY)
        return make_step(chunk, prompt_logprobs=(query,))

    await pipeline.submit(step(70))
    failed = await pipeline.receive()

    assert failed.fault is None
    assert "not finite" in failed.errors[0]
    assert len((await run_step(pipeline, step(71))).token_ids) == 1
    await pipeline.close()


def test_what_cannot_be_split_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")

    with pytest.raises(ConfigError, match=r"4 attention heads .*tensor_parallel_size=3; use one of \[1, 2, 4\]"):
        make_inline_pipeline(make_config(tmp_path, tp_size=3))
