"""The figures that need nothing but the times of single steps say what the paper does of its machines."""

from dataclasses import replace

import pytest

from rayserve_sarathi.simulation.figures.chunking import chunking
from rayserve_sarathi.simulation.figures.linear_layers import linear_layers
from rayserve_sarathi.simulation.figures.machine import Machine, decode_step, interval_s, prompt_step
from rayserve_sarathi.simulation.figures.operators import GROUPS, linear_share, time_by_operator
from rayserve_sarathi.simulation.figures.throughput import throughput
from tests.measured_data import data_folder
from tests.simulation.figures.machines import YI, YI_PIPELINE

MACHINES = [YI, YI_PIPELINE, Machine(model="mistral-7b", hardware="a100"), Machine(model="llama3-8b", hardware="h100")]
each_machine = pytest.mark.parametrize("machine", MACHINES, ids=lambda machine: machine.title)


@each_machine
def test_decode_throughput_grows_almost_with_the_batch_and_prefill_throughput_hardly(machine: Machine):
    series = throughput(machine.step_times(), batch_sizes=(1, 4, 16, 32))

    first, *_, last = series.decode_tokens_per_s
    assert 0.7 * 32 < last / first <= 32
    assert sorted(series.decode_tokens_per_s) == list(series.decode_tokens_per_s)
    assert 1 <= max(series.prefill_tokens_per_s) / series.prefill_tokens_per_s[0] < 1.25


def test_a_full_pipeline_returns_a_step_as_often_as_its_slowest_stage_does():
    model = YI_PIPELINE.step_times()

    for shape in (prompt_step(1, 1024), decode_step(32, 1024)):
        assert interval_s(model, shape) == max(model.stage_times_s(shape))
        assert interval_s(model, shape) < 0.6 * model.latency_s(shape)


@each_machine
def test_every_part_of_a_step_is_in_one_group(machine: Machine):
    model = machine.step_times()
    series = time_by_operator(model, num_decodes=32, lengths=(1024,))

    assert sum(values[0] for values in series.prefill_s.values()) == pytest.approx(
        model.latency_s(prompt_step(1, 1024))
    )
    assert sum(values[0] for values in series.decode_s.values()) == pytest.approx(
        model.latency_s(decode_step(32, 1024))
    )
    parts = [part for group in GROUPS.values() for part in group]
    assert sorted(parts) == sorted(model.parts_s(decode_step(1, 1)))


@each_machine
def test_linear_layers_take_most_of_a_prefill_and_attention_grows_with_the_context(machine: Machine):
    series = time_by_operator(machine.step_times(), lengths=(1024, 2048, 4096))

    assert linear_share(series.prefill_s, 1) > 0.6
    assert series.decode_s["attention"][2] > series.decode_s["attention"][0]
    assert series.decode_s["MLP products"][2] == series.decode_s["MLP products"][0]


@each_machine
def test_the_knee_is_where_the_intensity_meets_the_balance_of_the_machine(machine: Machine):
    series = linear_layers(machine, machine.step_times())

    assert series.balance_tokens is not None
    assert series.knee_tokens == pytest.approx(series.balance_tokens, rel=0.15)
    before, after = (series.num_tokens.index(tokens) for tokens in (32, 4096))
    assert series.time_s[before] < 1.1 * series.time_s[0], "flat below the knee"
    assert series.time_s[after] / series.time_s[series.num_tokens.index(2048)] == pytest.approx(2, rel=0.05)


def test_the_knee_of_an_h100_is_at_about_twice_the_tokens_of_an_a100():
    a100, h100 = (
        linear_layers(machine, machine.step_times()).knee_tokens
        for machine in (Machine(model="llama3-8b", hardware=name) for name in ("a100", "h100"))
    )
    assert 1.7 < h100 / a100 < 2.3


def test_without_enough_tokens_the_balance_is_not_reached():
    assert linear_layers(YI, YI.step_times(), num_tokens=(1, 2, 4)).balance_tokens is None


@each_machine
def test_chunks_cost_the_more_the_smaller_they_are_and_little_from_512_tokens_on(machine: Machine):
    series = chunking(machine.step_times(), chunk_sizes=(128, 512, 2048), prompt_lens=(2048, 4096))

    for small, medium, large in series.relative_times:
        assert small is not None and medium is not None and large is not None
        assert small > medium > large >= 1
        assert medium < 1.35
    assert series.relative_times[0][2] == 1.0, "a single chunk is the whole prompt"


def test_a_chunk_longer_than_the_prompt_has_no_value():
    assert chunking(YI.step_times(), chunk_sizes=(512, 4096), prompt_lens=(1024,)).relative_times[0][1] is None


def test_measured_linear_layers_have_their_knee_where_the_paper_saw_it():
    folder = data_folder()
    if folder is None or not (folder / "profiles").is_dir():
        pytest.skip("no measured profiles; set SARATHI_DATA to their folder")
    machine = replace(YI, profiles=folder / "profiles")

    series = linear_layers(machine, machine.step_times())

    assert machine.title == "yi-34b on 2 x a100, TP2, measured profiles"
    assert 120 < series.knee_tokens < 300
