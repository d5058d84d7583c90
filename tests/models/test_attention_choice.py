"""Which attention backend `auto` is, and what is said where one cannot be had."""

import logging
import re
import shutil
from dataclasses import replace

import pytest
import torch

from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.kernels import native
from rayserve_sarathi.kernels.attention.cpp import CppAttention
from rayserve_sarathi.kernels.attention.reference import TorchAttention
from rayserve_sarathi.models.load import choose_attention_backend
from rayserve_sarathi.models.resolve import resolve_model

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="there is no compiler to build with")

CONFIG = EngineConfig(model="sarathi-tiny", device="cpu")
CPU = torch.device("cpu")


def choose(config: EngineConfig, *, dtype: torch.dtype = torch.float32, head_size: int = 32) -> object:
    decoder = replace(resolve_model(CONFIG).decoder, head_dim=head_size)
    return choose_attention_backend(config, decoder, device=CPU, dtype=dtype)


@pytest.fixture
def no_build(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail() -> None:
        raise native.NativeBuildError("the C++ kernels cannot be built (no compiler)")

    monkeypatch.setattr("rayserve_sarathi.kernels.attention.cpp.load_library", fail)


def test_a_cpu_attends_in_cpp():
    assert isinstance(choose(CONFIG), CppAttention)
    assert isinstance(choose(replace(CONFIG, attention_backend="torch")), TorchAttention)


@pytest.mark.parametrize(
    ("config", "settings", "reason"),
    [
        (replace(CONFIG, block_size=8), {}, "block_size must be a multiple of 16, got 8"),
        (CONFIG, {"dtype": torch.float16}, "float32 and bfloat16, not float16"),
        (CONFIG, {"head_size": 20}, "the head size must be a multiple of [0-9]+ on this CPU, got 20"),
    ],
)
def test_what_it_cannot_do_is_done_by_torch_and_told(config, settings, reason: str, caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(choose(config, **settings), TorchAttention)

    assert "attention backend torch (not cpp: " in caplog.text
    assert re.search(reason, caplog.text)
    with pytest.raises(ConfigError, match=f"attention_backend cannot be cpp here, not cpp: .*{reason}; use auto"):
        choose(replace(config, attention_backend="cpp"), **settings)


@pytest.mark.usefixtures("no_build")
def test_without_a_build_torch_attends(caplog):
    with caplog.at_level(logging.INFO):
        assert isinstance(choose(CONFIG), TorchAttention)

    assert "attention backend torch (not cpp: the C++ kernels cannot be built (no compiler))" in caplog.text
    with pytest.raises(ConfigError, match="cannot be built"):
        choose(replace(CONFIG, attention_backend="cpp"))
