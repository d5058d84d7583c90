"""`sarathi profile`, on the model inside the package: what is measured is what is predicted. No time is asserted."""

import json
from pathlib import Path

import numpy as np
import pytest

from rayserve_sarathi.cli import main
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.profiling.grid import Grid, make_grid, make_step
from rayserve_sarathi.profiling.profile import build_profile, check_profile, measure_profile, measure_scheduler_s
from rayserve_sarathi.profiling.stage_clock import ClockTimes, StageClock, StepTimes, parts_of
from rayserve_sarathi.simulation.model_shape import find_model, rank_shape
from rayserve_sarathi.simulation.profile_files import REQUIRED, read_profile, write_profile
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.step_shape import StepShape, shape_of

MODEL = "sarathi-tiny"
GRID = Grid(decodes=(1, 4), decode_contexts=(0, 64), chunks=(2, 16, 32), chunk_contexts=(0, 64), repeats=1)
PATH = "cpu-sarathi-tiny-tp1.csv"

DECODES = {
    (size, context): StepTimes(
        prepare_s=1e-4 * size,
        embed_s=1e-5 * size,
        attention_s=1e-4 * size * (1 + context),
        layers_s=1e-3 * size,
        sample_s=2e-4 * size,
    )
    for size in (1, 4)
    for context in (0, 64)
}
CHUNKS = {
    (size, context): StepTimes(
        prepare_s=1e-4,
        embed_s=1e-5 * size,
        attention_s=1e-6 * size * (size + context),
        layers_s=1e-3 * size,
        sample_s=2e-4,
    )
    for size in (16, 32, 64)
    for context in (0, 64, 128)
}
SCHEDULE_S = {1: 3e-4, 4: 6e-4}


@pytest.fixture(scope="module")
def clock() -> StageClock:
    return StageClock(EngineConfig(model=MODEL, device="cpu", load_format="dummy"), num_blocks=64)


def test_a_step_has_requests_of_the_asked_sizes_that_share_no_block():
    step = make_step(num_decodes=3, decode_context=17, chunks=((20, 16),), block_size=16, vocab_size=50)

    assert shape_of(step) == StepShape(num_decodes=3, decode_context_tokens=51, chunks=((20, 16),), num_samples=4)
    assert step.num_blocks.tolist() == [2, 2, 2, 3]
    assert step.block_tables.tolist() == list(range(9))
    assert step.token_ids.max() < 50


def test_a_grid_reaches_its_largest_sizes_and_leaves_out_what_has_no_room():
    grid = make_grid(max_tokens=300, max_decodes=20, max_context=1000, repeats=1)

    assert (grid.decodes, grid.decode_contexts) == ((1, 2, 4, 8, 16, 20), (0, 64, 256, 512, 1000))
    assert grid.chunks[-3:] == (192, 256, 300)
    limits = {"max_model_len": 600, "num_blocks": 40, "block_size": 16}
    assert (4, 64) in set(grid.decode_steps(**limits))
    assert (8, 64) in set(grid.decode_steps(**limits))
    assert (16, 64) not in set(grid.decode_steps(**limits)), "80 blocks"
    assert (1, 1000) not in set(grid.decode_steps(**limits)), "beyond the model's limit"
    assert (300, 256) in set(grid.chunk_steps(**limits))
    assert (300, 512) not in set(grid.chunk_steps(**limits))


def test_steps_are_predicted_as_they_were_measured(tmp_path: Path):
    shape = rank_shape(find_model(MODEL))
    write_profile(tmp_path / PATH, build_profile(shape, DECODES, CHUNKS, SCHEDULE_S))
    model = make_step_time_model(MODEL, "cpu", source="profile", profiles=tmp_path)

    for (size, context), times in DECODES.items():
        step = StepShape(num_decodes=size, decode_context_tokens=size * context, chunks=(), num_samples=size)
        assert model.latency_s(step) == pytest.approx(SCHEDULE_S[size] + times.total_s, rel=1e-3)
        assert model.cpu_s(step) == pytest.approx(SCHEDULE_S[size] + times.prepare_s, rel=1e-3)
    for (size, context), times in CHUNKS.items():
        step = StepShape(num_decodes=0, decode_context_tokens=0, chunks=((size, context),), num_samples=1)
        assert model.latency_s(step) == pytest.approx(SCHEDULE_S[1] + times.total_s, rel=1e-3)


def test_a_device_without_tiles_is_interpolated_between_measured_sizes(tmp_path: Path):
    shape = rank_shape(find_model(MODEL))
    write_profile(tmp_path / PATH, build_profile(shape, DECODES, CHUNKS, SCHEDULE_S))
    model = make_step_time_model(MODEL, "cpu", source="profile", profiles=tmp_path)

    parts = [
        model.parts_s(StepShape(num_decodes=0, decode_context_tokens=0, chunks=((size, 0),), num_samples=1))["up"]
        for size in (32, 40, 64)
    ]
    assert parts[1] == pytest.approx(parts[0] + (parts[2] - parts[0]) / 4, rel=1e-3)


def test_what_is_measured_is_a_profile_that_predicts(clock: StageClock, tmp_path: Path):
    profile = measure_profile(clock, GRID, note=lambda text: None)
    write_profile(tmp_path / PATH, profile)

    read = read_profile(tmp_path / PATH)
    assert set(read) == set(REQUIRED)
    assert [(point.size, point.context_len) for point in read["decode_attention"].points] == [
        *((1, 0), (1, 64), (4, 0), (4, 64))
    ]
    assert [point.size for point in read["up"].points] == [1, 2, 4, 16, 32]
    assert all(point.time_s > 0 for point in read["chunk_attention"].points)
    model = make_step_time_model(MODEL, "cpu", source="profile", profiles=tmp_path)
    checks = check_profile(clock, model, profile, GRID, note=lambda text: None)
    assert {(check.num_decodes, check.query_len) for check in checks} == {(2, 8), (2, 16)}
    assert all(check.measured_s > 0 and check.predicted_s > 0 for check in checks)


def test_parts_of_a_step_are_not_negative_and_attention_is_one_of_them(clock: StageClock):
    step = make_step(num_decodes=2, decode_context=40, chunks=((24, 8),), block_size=16, vocab_size=100)
    (times,) = clock.measure([step], repeats=2, note=lambda text: None)

    parts = [times.prepare_s, times.embed_s, times.attention_s, times.layers_s, times.sample_s]
    assert min(parts) >= 0
    assert times.attention_s > 0
    assert times.total_s == pytest.approx(float(np.sum(parts)))


def test_a_part_that_is_a_difference_is_that_of_typical_times():
    quiet = {"prepare_s": 1.0, "embed_s": 2.0, "forward_s": 20.0, "attention_s": 5.0, "sample_s": 3.0}
    readings = [ClockTimes(**quiet | disturbed) for disturbed in ({"attention_s": 9.0}, {"forward_s": 30.0}, {})]

    parts = parts_of(readings)

    assert parts.layers_s == 20.0 - 5.0 - 1.0 - 2.0
    assert parts.total_s == 20.0 + 3.0


def test_the_scheduler_has_a_time_for_any_number_of_decodes():
    assert all(measure_scheduler_s(num_decodes) > 0 for num_decodes in (1, 600))


def test_the_command_writes_what_predict_reads(capsys, tmp_path: Path):
    sizes = "--max-tokens 16 --max-decodes 2 --max-context 32 --kv-tokens 256 --repeats 1"
    folder = str(tmp_path / "new")
    command = ["profile", "--model", MODEL, "--hardware", "cpu", "--device", "cpu", "--folder", folder, *sizes.split()]
    assert main(command) == 0
    told = capsys.readouterr()
    assert "steps, time 1 of 1" in told.err
    assert "steps that were not in it" in told.out

    predict = ["predict", "--model", MODEL, "--hardware", "cpu", "--profiles", folder]
    assert main([*predict, "--decodes", "2", "--context", "32", "--json"]) == 0
    prediction = json.loads(capsys.readouterr().out)
    assert prediction["source"] == "profile"
    assert prediction["total_s"] > 0


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        (["--max-tokens", "1"], "at least 2 tokens, 1 decode and 1 token of context are measured, got 1, 64 and 4096"),
        (["--repeats", "0"], "repeats must be at least 1, got 0"),
        (["--kv-tokens", "3"], "a KV cache of 3 tokens has no block; give at least 16"),
    ],
)
def test_what_cannot_be_measured_is_refused(capsys, tmp_path: Path, options: list[str], problem: str):
    command = ["profile", "--model", MODEL, "--hardware", "cpu", "--device", "cpu", "--folder", str(tmp_path)]
    assert main([*command, *options]) == 1

    assert problem in capsys.readouterr().err


def test_a_grid_without_sizes_is_refused():
    with pytest.raises(ConfigError, match=r"chunks must be numbers of at least 2, got \[1\]"):
        Grid(decodes=(1,), decode_contexts=(0,), chunks=(1,), chunk_contexts=(0,))
