"""The format of measured profiles, and models made from it."""

import sys
from collections.abc import Mapping
from pathlib import Path

import pyarrow
import pyarrow.csv
import pyarrow.parquet
import pytest

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.model_shape import RankShape, find_model, rank_shape
from rayserve_sarathi.simulation.profile_files import (
    LAYER_ELEMENTWISE,
    LAYER_MATRICES,
    OperatorProfile,
    Point,
    make_operator_profile,
    read_profile,
    write_profile,
)
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.step_shape import StepShape

US = 1e-6


def made_up_profile(shape: RankShape) -> dict[str, OperatorProfile]:
    """Return a profile where a token of a layer takes 1 us in each operator, and everything else round figures too."""
    tokens = [Point(size, 0, size * US) for size in (1, 8, 64, 128, 256, 384, 512)]
    requests = [Point(size, 0, size * US) for size in (1, 128)]
    profile = {operator: make_operator_profile(shape.matrix_flops(operator), tokens) for operator in LAYER_MATRICES} | {
        operator: make_operator_profile(shape.elements(operator), tokens)
        for operator in (*LAYER_ELEMENTWISE, "embedding")
    }
    attention = [Point(size, context, size * US) for size in (1, 64, 128, 256, 512) for context in range(0, 513, 32)]
    return profile | {
        "decode_attention": make_operator_profile(2 * shape.kv_size, attention),
        "chunk_attention": make_operator_profile(4 * shape.q_size, attention),
        "all_reduce": make_operator_profile(1, [Point(1, 0, 0.0), Point(10**9, 0, 1.0)]),
        "send": make_operator_profile(1, [Point(1, 0, 0.0), Point(10**9, 0, 2.0)]),
        "sample": make_operator_profile(shape.matrix_flops("head"), requests),
        "schedule": make_operator_profile(1, [Point(1, 0, 100 * US)]),
        "prepare": make_operator_profile(1, [Point(1, 0, 10 * US)]),
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    shape = rank_shape(find_model("llama3-8b"), tensor_parallel_size=2)
    write_profile(tmp_path / "a100-llama3-8b-tp2.csv", made_up_profile(shape))
    return tmp_path


def test_a_profile_is_read_as_it_was_written(tmp_path: Path):
    profile = made_up_profile(rank_shape(find_model("llama3-8b")))
    write_profile(tmp_path / "profile.csv", profile)
    read = read_profile(tmp_path / "profile.csv")

    assert read.keys() == profile.keys()
    for operator, measured in profile.items():
        assert read[operator].work == measured.work
        for point, other in zip(read[operator].points, measured.points, strict=True):
            assert (point.size, point.context_len) == (other.size, other.context_len)
            assert point.time_s == pytest.approx(other.time_s)


def test_what_was_measured_twice_counts_with_its_mean():
    measured = make_operator_profile(1, [Point(8, 0, 1.0), Point(4, 0, 5.0), Point(8, 0, 2.0)])

    assert measured.points == (Point(4, 0, 5.0), Point(8, 0, 1.5))


def test_a_step_is_the_sum_of_its_operators(folder: Path):
    model = make_step_time_model(
        "llama3-8b", "a100", tensor_parallel_size=2, pipeline_parallel_size=2, source="profile", profiles=folder
    )
    step = StepShape(num_decodes=64, decode_context_tokens=64 * 100, chunks=((192, 64),), num_samples=64)
    first_s, last_s = model.stage_times_s(step)

    # 4 matrices, 2 norms, rope, activation and 2 adds of 256 tokens, attention of 64 and of 192, two all-reduces.
    layer_s = 10 * 256 * US + (64 + 192) * US + 2 * 256 * 4096 * 2 / 1e9
    assert first_s == pytest.approx(16 * layer_s + 256 * US, rel=1e-4)
    assert last_s == pytest.approx(16 * layer_s + 64 * US + 10 * US, rel=1e-4)
    assert model.transfer_s(step) == pytest.approx(2 * 256 * 4096 * 2 / 1e9, rel=1e-4)
    assert model.cpu_s(step) == pytest.approx(110 * US)
    assert sum(model.parts_s(step).values()) == pytest.approx(model.latency_s(step))


def test_a_profile_of_another_shape_is_scaled_by_the_work(tmp_path: Path):
    llama, yi = (rank_shape(find_model(name)) for name in ("llama3-8b", "yi-34b"))
    write_profile(tmp_path / "a100-yi-34b-tp1.csv", made_up_profile(llama))
    model = make_step_time_model("yi-34b", "a100", source="profile", profiles=tmp_path)
    parts = model.parts_s(StepShape(num_decodes=0, decode_context_tokens=0, chunks=((256, 0),), num_samples=0))

    for operator in LAYER_MATRICES:
        ratio = yi.matrix_flops(operator) / llama.matrix_flops(operator)
        assert parts[operator] == pytest.approx(60 * 256 * US * ratio)
    assert parts["norm"] == pytest.approx(60 * 2 * 256 * US * 7168 / 4096)
    assert parts["chunk_attention"] == pytest.approx(60 * 256 * US * 56 / 32)


def test_parallelism_that_was_not_measured_is_refused(tmp_path: Path):
    shape = rank_shape(find_model("llama3-8b"), tensor_parallel_size=2)
    profile = made_up_profile(shape)
    del profile["all_reduce"]
    write_profile(tmp_path / "a100-llama3-8b-tp2.csv", profile)

    with pytest.raises(ConfigError, match="no all_reduce and no send_between_nodes for tensor_parallel_size=2"):
        make_step_time_model(
            "llama3-8b", "a100", tensor_parallel_size=2, pipeline_parallel_size=4, source="profile", profiles=tmp_path
        )


def test_a_profile_that_is_not_there_is_named(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"neither a100-yi-34b-tp2.csv nor the public profiles"):
        make_step_time_model("yi-34b", "a100", tensor_parallel_size=2, source="profile", profiles=tmp_path)
    with pytest.raises(ConfigError, match="source profile needs the folder"):
        make_step_time_model("yi-34b", "a100", source="profile")


HEADER = "operator,size,context_len,work,time_us\n"


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("operator,size\n", "the columns must be"),
        (HEADER + "gelu,1,0,1,1\n", "line 2: unknown operator 'gelu'; use one of"),
        (HEADER + "qkv,1.5,0,1,1\n", "line 2: invalid literal"),
        (HEADER + "qkv,1,0\n", "line 2: "),
        (HEADER + "qkv,1,0,1,-1\n", "must not be negative"),
        (HEADER + "qkv,1,0,1,nan\n", "must not be negative"),
        (HEADER + "qkv,1,0,1,1\nqkv,2,0,2,1\n", "line 3: work of qkv is 2.0, but 1.0 before"),
        (HEADER + "qkv,1,0,1,1\n", r"has no rows of \['o', 'up', "),
    ],
)
def test_a_malformed_file_is_an_error_that_names_the_line(tmp_path: Path, text: str, problem: str):
    path = tmp_path / "profile.csv"
    path.write_text(text)

    with pytest.raises(ConfigError, match=problem):
        read_profile(path)


def test_a_parquet_file_says_the_same(folder: Path):
    parallel = {"tensor_parallel_size": 2, "pipeline_parallel_size": 2}
    step = StepShape(num_decodes=64, decode_context_tokens=64 * 100, chunks=((192, 64),), num_samples=64)
    by_csv = make_step_time_model("llama3-8b", "a100", source="profile", profiles=folder, **parallel)
    path = folder / "a100-llama3-8b-tp2.csv"
    pyarrow.parquet.write_table(pyarrow.csv.read_csv(path), path.with_suffix(".parquet"))
    path.unlink()
    by_parquet = make_step_time_model("llama3-8b", "a100", source="profile", profiles=folder, **parallel)

    assert by_parquet.parts_s(step) == by_csv.parts_s(step)


def test_a_malformed_parquet_file_is_an_error_that_names_the_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = tmp_path / "profile.parquet"
    row = {"operator": "qkv", "size": 1, "context_len": 0, "work": 1.0, "time_us": 1.0}
    for rows, problem in [
        ([row, {**row, "time_us": -1.0}], "row 2: size 1, context_len 0 and time_us -1"),
        ([row, {**row, "size": None}], "row 2: invalid literal"),
        ([{"operator": "qkv"}], "the columns must be"),
    ]:
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        with pytest.raises(ConfigError, match=problem):
            read_profile(path)
    path.write_bytes(b"PAR1")
    with pytest.raises(ConfigError, match="cannot be read"):
        read_profile(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(ConfigError, match=r"pip install 'rayserve_sarathi\[parquet\]'"):
        read_profile(path)


def test_works_are_those_of_the_shape():
    profile: Mapping[str, OperatorProfile] = made_up_profile(rank_shape(find_model("llama3-8b")))

    assert profile["qkv"].work == 2 * 4096 * (32 + 16) * 128
    assert profile["up"].work == 2 * 4096 * 2 * 14336
    assert profile["decode_attention"].work == 2 * 8 * 128
