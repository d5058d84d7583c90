"""A decoder's last layer goes on with each request's last token alone where those are enough."""

from pathlib import Path

import pytest
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.execution.model_input import build_model_input
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from rayserve_sarathi.profiling.grid import make_step
from tests.checkpoints import FAMILIES, save_checkpoint
from tests.stages import random_pools

BLOCK_SIZE = 16


@pytest.mark.parametrize("backend", ["auto", "torch"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
@torch.inference_mode()
def test_last_tokens_alone_have_the_same_hidden_states(tmp_path: Path, family: str, backend: str) -> None:
    save_checkpoint(tmp_path, family)
    config = EngineConfig(model=str(tmp_path), device="cpu", attention_backend=backend, block_size=BLOCK_SIZE)
    decoder = load_decoder(config, resolve_model(config), stage=0)
    step = make_step(
        num_decodes=2, decode_context=21, chunks=((2, 0), (33, 20), (17, 16)), block_size=BLOCK_SIZE, vocab_size=60
    )
    model_input = build_model_input(step, block_size=BLOCK_SIZE, device=torch.device("cpu"))
    made = []
    for last_only in (False, True):
        pools = random_pools(decoder, num_blocks=24, block_size=BLOCK_SIZE)
        hidden = decoder.embed(model_input.token_ids)
        made.append((decoder.forward(hidden, model_input.metadata, pools, last_only=last_only), pools))
    (whole, whole_pools), (last, last_pools) = made

    torch.testing.assert_close(last, whole[[0, 1, 3, 36, 53]], atol=1e-4, rtol=1e-4)
    for one, other in zip(whole_pools, last_pools, strict=True):
        assert torch.equal(one[0], other[0]) and torch.equal(one[1], other[1])
