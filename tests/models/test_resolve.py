import json
import subprocess
import sys
from pathlib import Path

import pytest
from pydantic import JsonValue

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.models.resolve import find_tokenizer, resolve_model
from tests.checkpoints import VOCAB_SIZE, save_checkpoint


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("llama")
    save_checkpoint(folder, "llama")
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 2, 100000]}))
    return folder


def test_a_folder(folder: Path) -> None:
    info = resolve_model(EngineConfig(model=str(folder)))

    assert info.root == folder
    assert info.architecture == "LlamaForCausalLM"
    assert (info.vocab_size, info.max_model_len) == (VOCAB_SIZE, 128)
    # Of both files; an id that no logit stands for is left out.
    assert info.eos_token_ids == (2, 7)


def test_a_shorter_max_model_len_is_taken_and_a_longer_one_refused(folder: Path) -> None:
    assert resolve_model(EngineConfig(model=str(folder), max_model_len=100)).max_model_len == 100
    with pytest.raises(ConfigError, match=r"max_model_len=129 exceeds the 128 positions .* use at most 128"):
        resolve_model(EngineConfig(model=str(folder), max_model_len=129))


@pytest.mark.parametrize(
    "model", ["/no/such/folder", "../..", "a/../b", "a/b/c", "~/nothing/here", "~nobody/x", "a" * 5000]
)
def test_what_is_neither_a_folder_nor_a_hub_id_is_refused(
    model: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")

    with pytest.raises(ConfigError):
        resolve_model(EngineConfig(model=model))


def test_a_hub_id_that_cannot_be_fetched_is_refused_with_a_hint() -> None:
    with pytest.raises(ConfigError, match=r"'nobody/nothing' is no folder here and could not be fetched.*HF_TOKEN"):
        resolve_model(EngineConfig(model="nobody/nothing"))


def test_a_broken_config_names_its_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"config.json cannot be read: .*is the checkpoint complete"):
        resolve_model(EngineConfig(model=str(tmp_path)))
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(ConfigError, match=r"config.json must hold a mapping, got list"):
        resolve_model(EngineConfig(model=str(tmp_path)))


def test_overrides_replace_keys_of_the_config(folder: Path) -> None:
    config = EngineConfig(
        model=str(folder), hf_overrides={"num_hidden_layers": 2, "hidden_size": 64, "eos_token_id": 3}
    )
    info = resolve_model(config)

    assert (info.decoder.num_hidden_layers, info.decoder.hidden_size) == (2, 64)
    assert info.eos_token_ids == (2, 3, 7)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"num_hiden_layers": 2}, r"hf_overrides.num_hiden_layers is nothing that .* did you mean num_hidden_layers"),
        ({"ffn_hidden_size": 8}, r"hf_overrides.ffn_hidden_size is nothing that"),  # Falcon's word, not Llama's
        ({"zzz": 2}, r"hf_overrides.zzz is nothing that .*; use one of \["),
        ({"num_hidden_layers": "2"}, r"config.json with hf_overrides: num_hidden_layers must be a whole number"),
        ({"num_attention_heads": 3}, r"num_attention_heads=3 must be a multiple of num_key_value_heads=2"),
    ],
)
def test_an_override_that_changes_nothing_or_is_wrong_is_refused(
    folder: Path, overrides: dict[str, JsonValue], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        resolve_model(EngineConfig(model=str(folder), hf_overrides=overrides))


def test_the_tokenizer_is_the_models_unless_another_is_named(folder: Path) -> None:
    info = resolve_model(EngineConfig(model=str(folder)))

    assert find_tokenizer(EngineConfig(model=str(folder)), info) == str(folder)
    assert find_tokenizer(EngineConfig(model=str(folder), tokenizer="a/b"), info) == "a/b"
    tiny = find_tokenizer(EngineConfig(model=str(folder), tokenizer="sarathi-tiny"), info)
    assert (Path(tiny) / "tokenizer.json").is_file()


def test_resolving_loads_neither_torch_nor_ray() -> None:
    code = "import sys, rayserve_sarathi.models.resolve; print({'torch', 'ray', 'transformers'} & set(sys.modules))"

    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "set()\n"
