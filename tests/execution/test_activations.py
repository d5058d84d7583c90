"""Hidden states beside the message: over a process group of the two stages of a link."""

import contextlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.activations import ByProcessGroup, InMessage, open_group, pack, unpack
from rayserve_sarathi.execution.stage import StageMessage
from rayserve_sarathi.execution.wire import Activation
from rayserve_sarathi.step import StepFault
from tests.execution.wired import TIMEOUT_S, make_stages, make_steps, wired
from tests.servable import save_servable
from tests.stages import Chunk, make_step

CPU = torch.device("cpu")
STEP = make_step(Chunk(token_ids=[1], block_ids=[0]))
FAULT = StepFault(message="stage 0 failed", stage=0)


@contextlib.contextmanager
def link() -> Iterator[tuple[ByProcessGroup, ByProcessGroup]]:
    """Join two ends of this process; yield the sender's and the receiver's."""
    store = dist.HashStore()
    with ThreadPoolExecutor(2) as threads:
        ends = [
            threads.submit(
                open_group,
                store,
                is_sender=is_sender,
                meeting_timeout_s=TIMEOUT_S,
                timeout_s=TIMEOUT_S,
                device=CPU,
            )
            for is_sender in (True, False)
        ]
        sender, receiver = (end.result(TIMEOUT_S) for end in ends)
    yield sender, receiver
    sender.close()
    receiver.close()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_hidden_states_go_beside_the_message(dtype: torch.dtype):
    with link() as (sender, receiver):
        for num_tokens in range(1, 20):
            hidden = torch.randn(16, num_tokens).to(dtype).T
            relayed = pack(StageMessage(step=STEP, hidden=hidden), sender)
            message, wait = unpack(relayed, receiver)

            assert relayed.hidden == Activation(
                shape=(num_tokens, 16), dtype=str(dtype).removeprefix("torch."), data=None
            )
            assert message.hidden is None
            assert wait is not None
            assert torch.equal(wait(), hidden)


def test_several_may_be_on_the_way():
    with link() as (sender, receiver):
        tensors = [torch.full((3, 4), float(index)) for index in range(5)]
        relayed = [pack(StageMessage(step=STEP, hidden=hidden), sender) for hidden in tensors]
        waits = [unpack(message, receiver)[1] for message in relayed]

        assert all(torch.equal(wait(), hidden) for wait, hidden in zip(waits, tensors, strict=True) if wait)


def test_a_message_without_hidden_states_sends_none():
    with link() as (sender, receiver):
        relayed = pack(StageMessage(step=STEP, fault=FAULT), sender)

        assert unpack(relayed, receiver) == (StageMessage(step=STEP, fault=FAULT), None)


def test_ends_that_use_different_paths_are_told_so():
    with link() as (_, receiver):
        relayed = pack(StageMessage(step=STEP, hidden=torch.zeros(1, 4)), InMessage())
        with pytest.raises(WireError, match="are to come by a process group"):
            unpack(relayed, receiver)


def test_an_end_that_is_alone_gives_up():
    with pytest.raises(PipelineFaultError, match="link between two stages"):
        open_group(dist.HashStore(), is_sender=True, meeting_timeout_s=0.1, timeout_s=TIMEOUT_S, device=CPU)


async def test_a_pipeline_whose_hidden_states_go_beside_the_messages_computes_the_same(tmp_path: Path):
    steps = make_steps(4)
    stages = make_stages(save_servable(tmp_path), num_stages=2)
    async with wired(stages) as pipeline:
        expected = await pipeline.run(steps)
    with link() as (sender, receiver):
        async with wired(stages, epoch=1, links=[(sender, receiver)]) as pipeline:
            outputs = await pipeline.run([replace(step, epoch=1) for step in steps])

    assert [output.fault for output in outputs] == [None] * 4
    assert [output.token_ids.tolist() for output in outputs] == [output.token_ids.tolist() for output in expected]


def test_who_waits_for_hidden_states_of_a_stage_that_left_hears_of_it():
    with link() as (sender, receiver), ThreadPoolExecutor(1) as thread:
        wait = receiver.receive((1, 4), torch.float32, None)
        waiting = thread.submit(wait)
        sender.close()
        with pytest.raises(PipelineFaultError, match="link between two stages"):
            waiting.result(TIMEOUT_S)
