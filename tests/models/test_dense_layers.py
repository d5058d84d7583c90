"""All layers in one call of the C++ kernels compute what the layers compute one by one, to the same bits."""

import shutil
from pathlib import Path

import pytest
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.kv_cache import allocate_kv_caches
from rayserve_sarathi.execution.model_input import build_model_input
from rayserve_sarathi.kernels.attention.cpp import CppAttention
from rayserve_sarathi.models.decoder import Decoder
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from tests.checkpoints import save_checkpoint
from tests.stages import random_pools

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler to build with")

WIDE = {"hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4, "num_key_value_heads": 2}
FAMILIES = ["llama", "llama-biases", "mistral-window", "qwen2"]
STEPS = {
    "a decode": (1, ()),
    "decodes": (5, ()),
    "a chunk": (0, ((40, 0),)),
    "chunks and decodes": (3, ((2, 0), (33, 20), (17, 16))),
}


class Apart(CppAttention):
    """The same kernels, a layer at a time."""

    is_in_layers = False


def load(folder: Path, family: str, wrap) -> Decoder:
    save_checkpoint(folder, family, **WIDE)
    config = EngineConfig(model=str(folder), device="cpu")
    return load_decoder(config, resolve_model(config), stage=0, wrap_backend=wrap)


@pytest.mark.parametrize("last_only", [False, True])
@pytest.mark.parametrize("num_threads", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_they_compute_the_same_bits(tmp_path: Path, family: str, num_threads: int, last_only: bool) -> None:
    together = load(tmp_path, family, lambda backend: backend)
    apart = load(tmp_path, family, lambda backend: Apart())
    assert together.joins_layers and not apart.joins_layers
    torch.set_num_threads(num_threads)
    try:
        for num_decodes, chunks in STEPS.values():
            step = make_step(num_decodes=num_decodes, decode_context=21, chunks=chunks, block_size=16, vocab_size=60)
            model_input = build_model_input(step, block_size=16, device=torch.device("cpu"))
            outputs = []
            for decoder in (together, apart):
                pools = random_pools(decoder, num_blocks=24, block_size=16)
                hidden = decoder.embed(model_input.token_ids)
                outputs.append((decoder.forward(hidden, model_input.metadata, pools, last_only=last_only), pools))
            (ours, our_pools), (plain, plain_pools) = outputs
            assert len(ours) == (num_decodes + len(chunks) if last_only else step.num_tokens)
            assert torch.equal(ours, plain)
            for one, other in zip(our_pools, plain_pools, strict=True):
                assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize(("family", "settings"), [("qwen3", WIDE), ("falcon-7b", {}), ("mixtral", {})])
def test_layers_of_another_kind_are_computed_one_by_one(tmp_path: Path, family: str, settings: dict[str, int]) -> None:
    save_checkpoint(tmp_path, family, **settings)
    config = EngineConfig(model=str(tmp_path), device="cpu")

    assert not load_decoder(config, resolve_model(config), stage=0).joins_layers


def test_hidden_states_of_the_stage_before_are_not_changed(tmp_path: Path) -> None:
    decoder = load(tmp_path, "llama", lambda backend: backend)
    step = make_step(num_decodes=2, decode_context=3, chunks=(), block_size=16, vocab_size=60)
    model_input = build_model_input(step, block_size=16, device=torch.device("cpu"))
    hidden = torch.randn(2, 64)
    before = hidden.clone()

    decoder.forward(hidden, model_input.metadata, allocate_kv_caches(decoder, num_blocks=4, block_size=16))

    assert torch.equal(hidden, before)
