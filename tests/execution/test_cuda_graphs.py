"""What CUDA graphs read, without a GPU: filling up a step changes nothing for the requests in it."""

import pytest
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.cuda_graphs import (
    GraphSize,
    StepLimits,
    StepTensors,
    graph_sizes,
    refuse_graphs,
    size_for,
)
from rayserve_sarathi.execution.model_input import build_model_input, step_layout
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from tests.checkpoints import save_checkpoint
from tests.stages import random_pools

BLOCK_SIZE = 4
LIMITS = StepLimits(num_tokens=200, num_seqs=12, model_len=64)


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Decoder:
    pytest.importorskip("triton", reason="there is no Triton")
    folder = tmp_path_factory.mktemp("model")
    save_checkpoint(folder, "llama")
    config = EngineConfig(model=str(folder), device="cpu", attention_backend="triton", block_size=BLOCK_SIZE)
    return load_decoder(config, resolve_model(config), stage=0)


def step_of(num_decodes: int, chunks: tuple[tuple[int, int], ...]):
    return make_step(num_decodes=num_decodes, decode_context=9, chunks=chunks, block_size=BLOCK_SIZE, vocab_size=60)


@pytest.mark.parametrize(
    ("num_decodes", "chunks"), [(3, ()), (4, ()), (0, ((7, 0),)), (2, ((7, 5), (12, 0))), (1, ((2, 30),))]
)
@pytest.mark.parametrize("last_only", [False, True])
@torch.inference_mode()
def test_a_step_that_is_filled_up_has_the_same_hidden_states(
    decoder: Decoder, num_decodes: int, chunks, last_only: bool
) -> None:
    tensors = StepTensors(max_num_tokens=40, max_num_seqs=4, max_num_blocks=16, device=torch.device("cpu"))
    pools = random_pools(decoder, num_blocks=64, block_size=BLOCK_SIZE)
    step = step_of(num_decodes, chunks)
    size = GraphSize(num_tokens=40 if chunks else 4, num_requests=4, has_chunks=bool(chunks))
    # What an earlier step has left there must not matter.
    earlier = step_of(0, ((20, 0), (10, 30), (2, 8)))
    tensors.write(
        earlier.token_ids,
        step_layout(earlier, block_size=BLOCK_SIZE),
        GraphSize(num_tokens=40, num_requests=4, has_chunks=True),
    )

    model_input = build_model_input(step, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    plain_pools = [(k.clone(), v.clone()) for k, v in pools]
    expected = decoder.forward(
        decoder.embed(model_input.token_ids), model_input.metadata, plain_pools, last_only=last_only
    )
    layout = step_layout(step, block_size=BLOCK_SIZE)
    tensors.write(step.token_ids, layout, size)
    filled = decoder.forward(
        decoder.embed(tensors.token_ids(size)), tensors.metadata(size, layout), pools, last_only=last_only
    )

    assert len(expected) == (num_decodes + len(chunks) if last_only else step.num_tokens)
    torch.testing.assert_close(filled[: len(expected)], expected, atol=1e-4, rtol=1e-4)
    for ours, plain in zip(pools, plain_pools, strict=True):
        torch.testing.assert_close(ours, plain, atol=1e-4, rtol=1e-4)


def test_a_step_takes_the_least_graph_that_it_fits() -> None:
    sizes = graph_sizes(LIMITS)

    assert size_for(sizes, num_tokens=3, num_requests=3) == GraphSize(num_tokens=4, num_requests=4, has_chunks=False)
    assert size_for(sizes, num_tokens=12, num_requests=12) == GraphSize(
        num_tokens=12, num_requests=12, has_chunks=False
    )
    assert size_for(sizes, num_tokens=129, num_requests=2) == GraphSize(
        num_tokens=256, num_requests=12, has_chunks=True
    )


def test_a_step_that_no_graph_is_for_is_computed_without() -> None:
    assert size_for(graph_sizes(LIMITS), num_tokens=13, num_requests=13) is None
    large = StepLimits(num_tokens=5000, num_seqs=12, model_len=64)
    assert size_for(graph_sizes(large), num_tokens=2500, num_requests=2) is None


def test_the_largest_graph_comes_first_and_there_are_few() -> None:
    sizes = graph_sizes(StepLimits(num_tokens=2048, num_seqs=256, model_len=4096))

    assert [size.num_tokens for size in sizes] == sorted((size.num_tokens for size in sizes), reverse=True)
    assert len(sizes) < 40


def test_a_cpu_has_no_graphs(decoder: Decoder) -> None:
    assert refuse_graphs(decoder) == "the device is cpu"
