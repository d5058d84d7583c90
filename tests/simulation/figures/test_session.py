"""`sarathi figures`."""

import json
import sys
from pathlib import Path

import pytest

from rayserve_sarathi.cli import main
from rayserve_sarathi.simulation.figures.drawing import DRAWINGS
from rayserve_sarathi.simulation.figures.machine import Machine
from rayserve_sarathi.simulation.figures.session import SERIES, FigureSettings
from rayserve_sarathi.simulation.figures_command import FIGURES

YI = ["figures", "--model", "yi-34b", "--hardware", "a100", "--tensor-parallel-size", "2"]


def test_every_figure_is_written_as_png_and_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    assert main([*YI, "--out", str(tmp_path / "new"), "--num-requests", "16"]) == 0

    told = capsys.readouterr().out.split()
    assert told == [str(tmp_path / "new" / f"{name}.png") for name in FIGURES]
    for path in map(Path, told):
        content = path.read_bytes()
        assert content.startswith(b"\x89PNG")
        assert len(content) > 20_000, "an empty figure is smaller"
        written = json.loads(path.with_suffix(".json").read_text(), parse_constant=pytest.fail)
        assert written["machine"]["model"] == "yi-34b"
        assert written["machine"]["source"] == "roofline"
        assert written["machine"]["pipeline_parallel_size"] == (2 if path.stem == "bubbles" else 1)
        assert written["series"]


def test_the_command_the_series_and_the_drawings_have_the_same_names():
    assert list(FIGURES) == list(SERIES) == list(DRAWINGS)


def test_a_trace_and_a_rate_replace_the_drawn_ones(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n300,7\n")
    options = ["--only", "stalls", "--trace", str(trace), "--rate", "2", "--max-model-len", "2048"]

    assert main([*YI, "--out", str(tmp_path), *options]) == 0

    written = json.loads((tmp_path / "stalls.json").read_text())
    assert written["requests"] == {"trace": str(trace), "max_model_len": 2048, "seed": 0}
    assert written["series"]["rate"] == 2
    assert len(written["series"]["timelines"]["sarathi"]["followed_times_s"]) == 7


def test_a_trace_without_gaps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    trace = tmp_path / "trace.csv"
    trace.write_text("num_prefill_tokens,num_decode_tokens\n300,1\n")

    assert main([*YI, "--out", str(tmp_path), "--only", "stalls", "--trace", str(trace)]) == 1

    assert "no request generates two tokens" in capsys.readouterr().err


def test_a_seed_gives_the_same_series_again_and_another_gives_others(tmp_path: Path):
    machine = Machine(model="yi-34b", hardware="a100", tensor_parallel_size=2)
    first, second, other = (
        SERIES["bubbles"](FigureSettings(machine=machine, out=tmp_path, names=(), seed=seed)) for seed in (1, 1, 2)
    )
    assert first == second != other


def test_without_matplotlib_the_extra_is_named(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delitem(sys.modules, "rayserve_sarathi.simulation.figures.drawing")
    monkeypatch.setitem(sys.modules, "matplotlib", None)

    assert main([*YI, "--out", str(tmp_path)]) == 1

    assert "pip install 'rayserve_sarathi[figures]'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--budgets", "512", "0"], "--budgets must be at least 1, got (512, 0)"),
        (["--num-requests", "0"], "--num-requests must be at least 1, got 0"),
        (["--pipeline-parallel-size", "0"], "--pipeline-parallel-size must be at least 1, got 0"),
        (["--rate", "-1", "--only", "stalls"], "a rate is a number of requests a second greater than 0, got -1"),
        (["--profiles", "none"], "none has neither a100-yi-34b-tp2.csv nor the public profiles"),
        (["--tensor-parallel-size", "1", "--hardware", "cpu", "--only", "stalls"], "but cpu leaves"),
        (["--out", __file__, "--only", "chunking"], f"cannot write to --out {__file__}"),
    ],
)
def test_an_option_that_cannot_be_is_an_error_in_a_line(tmp_path: Path, capsys, options: list[str], problem: str):
    assert main([*YI, "--out", str(tmp_path), *options]) == 1

    assert problem in capsys.readouterr().err
