"""Checkpoints that are whole, in parts, damaged, or not what config.json says."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaForCausalLM

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.load import load_decoder
from rayserve_sarathi.models.resolve import resolve_model
from tests.checkpoints import hf_logits, save_checkpoint
from tests.stages import Chunk, Stages, make_step

PROMPT = [5, 9, 60, 33, 8, 21]
DOWN = "model.layers.1.mlp.down_proj.weight"


def load(folder: Path) -> None:
    config = EngineConfig(model=str(folder), device="cpu")
    load_decoder(config, resolve_model(config), stage=0)


def shard(folder: Path) -> tuple[Path, Path]:
    """Split the folder's weights into two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    parts = (names[::2], names[1::2])
    files = (folder / "model-00001-of-00002.safetensors", folder / "model-00002-of-00002.safetensors")
    for file, part in zip(files, parts, strict=True):
        save_file({name: tensors[name] for name in part}, file)
    weight_map = {name: file.name for file, part in zip(files, parts, strict=True) for name in part}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return files


def change(folder: Path, **changes: torch.Tensor | None) -> None:
    """Replace tensors of the folder's weights, or remove them."""
    tensors = load_file(folder / "model.safetensors") | changes
    save_file({name: tensor for name, tensor in tensors.items() if tensor is not None}, folder / "model.safetensors")


def test_a_sharded_checkpoint_gives_the_same_model(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "llama")
    shard(tmp_path)
    # Mistral's repositories hold the weights a second time, under other names.
    save_file({"layers.0.attention.wq.weight": torch.zeros(2)}, tmp_path / "consolidated.safetensors")

    logits = Stages(tmp_path).logits(make_step(Chunk(token_ids=PROMPT, block_ids=[0])))

    assert (logits - hf_logits(theirs, PROMPT)).abs().max() < 1e-4


def test_a_checkpoint_in_bfloat16_is_converted(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama").to(torch.bfloat16).save_pretrained(tmp_path)
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    logits = Stages(tmp_path, dtype="float32").logits(make_step(Chunk(token_ids=PROMPT, block_ids=[0])))

    assert (logits - hf_logits(theirs, PROMPT)).abs().max() < 1e-4


def test_the_first_yi_checkpoints_name_their_norms_otherwise(tmp_path: Path) -> None:
    theirs = save_checkpoint(tmp_path, "llama")
    renamed = {
        name.replace("input_layernorm", "ln1").replace("post_attention_layernorm", "ln2"): tensor
        for name, tensor in load_file(tmp_path / "model.safetensors").items()
    }
    save_file(renamed, tmp_path / "model.safetensors")
    hf_config = json.loads((tmp_path / "config.json").read_text())
    hf_config |= {"architectures": ["YiForCausalLM"], "auto_map": {"AutoModelForCausalLM": "modeling_yi.YiForCausalLM"}}
    (tmp_path / "config.json").write_text(json.dumps(hf_config))

    logits = Stages(tmp_path).logits(make_step(Chunk(token_ids=PROMPT, block_ids=[0])))

    assert (logits - hf_logits(theirs, PROMPT)).abs().max() < 1e-4


def test_a_missing_tensor_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    change(tmp_path, **{DOWN: None})

    with pytest.raises(ConfigError, match=f"no file has tensor {DOWN}"):
        load(tmp_path)


def test_an_unknown_tensor_is_named_with_its_file(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    change(tmp_path, **{"model.layers.0.self_attn.q_proj.bias": torch.zeros(32)})

    with pytest.raises(
        ConfigError, match=r"model.safetensors: tensor model.layers.0.self_attn.q_proj.bias .* no place"
    ):
        load(tmp_path)


def test_a_tensor_of_another_shape_is_named_with_both_shapes(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    change(tmp_path, **{DOWN: torch.zeros(32, 47)})

    with pytest.raises(ConfigError, match=rf"model.safetensors: tensor {DOWN} has shape \[32, 47\].*\[32, 48\]"):
        load(tmp_path)


def test_a_tensor_of_integers_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    change(tmp_path, **{DOWN: torch.zeros(32, 48, dtype=torch.int8)})

    with pytest.raises(ConfigError, match=f"tensor {DOWN} is I8; use a float32, float16 or bfloat16 checkpoint"):
        load(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 0.5, 0.99])
def test_a_truncated_file_is_named(tmp_path: Path, keep: float) -> None:
    save_checkpoint(tmp_path, "llama")
    file = tmp_path / "model.safetensors"
    data = file.read_bytes()
    file.write_bytes(data[: int(keep * len(data)) if keep < 1 else int(keep)])

    with pytest.raises(ConfigError, match=r"model.safetensors is damaged or incomplete: .*; download it again"):
        load(tmp_path)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    shard(tmp_path)[1].unlink()

    with pytest.raises(ConfigError, match=r"model-00002-of-00002.safetensors is missing"):
        load(tmp_path)


@pytest.mark.parametrize("name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors"])
def test_an_index_may_not_lead_out_of_its_folder(tmp_path: Path, name: str) -> None:
    save_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {DOWN: name}}))

    with pytest.raises(ConfigError, match="must name a file of the same folder"):
        load(tmp_path)


def test_what_lies_beside_the_weights_is_left_alone(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    save_file({"lora_A.weight": torch.zeros(2)}, tmp_path / "adapter_model.safetensors")

    load(tmp_path)


def test_a_tensor_in_two_files_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    first, second = shard(tmp_path)
    save_file(load_file(first) | load_file(second), second)

    with pytest.raises(ConfigError, match=f"is in {first.name} and in .*{second.name}"):
        load(tmp_path)


def test_a_head_of_its_own_counts_for_more_than_the_flag_that_ties_it(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama3-tied")
    change(tmp_path, **{"lm_head.weight": torch.randn(97, 32, generator=torch.Generator().manual_seed(3))})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    for num_stages in (1, 2):
        logits = Stages(tmp_path, num_stages=num_stages).logits(make_step(Chunk(token_ids=PROMPT, block_ids=[0])))

        assert (logits - hf_logits(theirs, PROMPT)).abs().max() < 1e-4


def test_a_head_without_an_embedding_is_both_where_they_are_tied(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama3-tied")
    embedding = load_file(tmp_path / "model.safetensors")["model.embed_tokens.weight"]
    change(tmp_path, **{"model.embed_tokens.weight": None, "lm_head.weight": embedding})
    theirs = LlamaForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)

    for num_stages in (1, 2):
        logits = Stages(tmp_path, num_stages=num_stages).logits(make_step(Chunk(token_ids=PROMPT, block_ids=[0])))

        assert (logits - hf_logits(theirs, PROMPT)).abs().max() < 1e-4


@pytest.mark.parametrize("suffix", ["qweight", "qzeros", "scales", "g_idx", "weight_scale", "weight_scale_inv"])
def test_quantized_weights_are_refused_as_such(tmp_path: Path, suffix: str) -> None:
    save_checkpoint(tmp_path, "llama")
    name = f"model.layers.0.self_attn.q_proj.{suffix}"
    change(tmp_path, **{name: torch.zeros(4, dtype=torch.int32), "also.unknown": torch.zeros(1)})

    with pytest.raises(ConfigError, match=f"model.safetensors: tensor {name}: quantized checkpoints are not supported"):
        load(tmp_path)


def test_pickles_are_refused_with_a_way_to_convert_them(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")

    with pytest.raises(ConfigError, match=r"pytorch_model.bin.*may run code; convert it: .*save_pretrained"):
        load(tmp_path)


def test_a_folder_without_weights_is_refused(tmp_path: Path) -> None:
    save_checkpoint(tmp_path, "llama")
    (tmp_path / "model.safetensors").unlink()

    with pytest.raises(ConfigError, match=r"no \*\.safetensors file; download the weights, or use load_format: dummy"):
        load(tmp_path)
