"""`sarathi predict`."""

import json

import pytest

from rayserve_sarathi.cli import main
from rayserve_sarathi.simulation.prediction import step_shapes
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.step_shape import StepShape

YI = ["predict", "--model", "yi-34b", "--hardware", "a100", "--tensor-parallel-size", "2"]


def test_a_prompt_is_computed_in_chunks_the_last_as_short_as_it_is():
    shapes = step_shapes(prefill=1100, chunk=512, num_decodes=2, context_len=100)

    assert [shape.chunks for shape in shapes] == [((512, 0),), ((512, 512),), ((76, 1024),)]
    assert [shape.num_samples for shape in shapes] == [2, 2, 3]
    assert all((shape.num_decodes, shape.decode_context_tokens) == (2, 200) for shape in shapes)


def test_a_last_chunk_of_one_token_is_a_decode():
    assert step_shapes(prefill=513, chunk=512, num_decodes=0, context_len=0)[-1] == StepShape(
        num_decodes=1, decode_context_tokens=512, chunks=(), num_samples=1
    )


def test_without_a_prompt_there_is_one_step_of_decodes():
    assert step_shapes(prefill=0, chunk=0, num_decodes=3, context_len=10) == [
        StepShape(num_decodes=3, decode_context_tokens=30, chunks=(), num_samples=3)
    ]


def test_json_has_each_step_and_their_sum(capsys):
    assert main([*YI, "--prefill", "2047", "--chunk", "512", "--json"]) == 0

    prediction = json.loads(capsys.readouterr().out)
    assert (prediction["model"], prediction["source"], prediction["num_steps"]) == ("yi-34b", "roofline", 4)
    assert [(step["query_len"], step["context_len"]) for step in prediction["steps"]] == [
        (512, 0),
        (512, 512),
        (512, 1024),
        (511, 1536),
    ]
    assert prediction["total_s"] == pytest.approx(sum(step["total_s"] for step in prediction["steps"]))
    for step in prediction["steps"]:
        assert step["total_s"] == pytest.approx(step["cpu_s"] + sum(step["stages_s"]))
        assert step["total_s"] == pytest.approx(sum(step["parts_s"].values()))


def test_a_pipeline_has_a_time_for_each_stage(capsys):
    assert main([*YI, "--pipeline-parallel-size", "2", "--decodes", "32", "--context", "4096", "--json"]) == 0

    (step,) = json.loads(capsys.readouterr().out)["steps"]
    model = make_step_time_model("yi-34b", "a100", tensor_parallel_size=2, pipeline_parallel_size=2)
    assert step["stages_s"] == model.stage_times_s(
        StepShape(num_decodes=32, decode_context_tokens=32 * 4096, chunks=(), num_samples=32)
    )
    assert step["total_s"] == pytest.approx(step["cpu_s"] + sum(step["stages_s"]) + step["transfer_s"])


def test_text_has_a_line_for_each_step_and_the_parts(capsys):
    assert main([*YI, "--prefill", "1000", "--chunk", "512"]) == 0

    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "yi-34b on a100, by roofline"
    assert lines[2].split()[:3] == ["512", "0", "0"]
    assert lines[3].split()[:3] == ["488", "512", "0"]
    assert "in 2 steps, of which" in lines[5]
    assert lines[6].split()[0] == "up", "the largest part first"


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ([], "there is nothing to predict; give --prefill, --decodes, or both"),
        (["--prefill", "8", "--chunk", "0"], "--chunk must be at least 1, got 0"),
        (["--decodes", "-1"], "--decodes must be at least 0, got -1"),
        (["--prefill", "8", "--pipeline-parallel-size", "0"], "--pipeline-parallel-size must be at least 1, got 0"),
        (["--prefill", "8", "--pipeline-parallel-size", "61"], "60 layers cannot be split over 61 stages"),
        (["--prefill", "8", "--tensor-parallel-size", "3"], "cannot be split over tensor_parallel_size=3"),
        (["--prefill", "8", "--profiles", "none"], "none has neither a100-yi-34b-tp2.csv nor the public profiles"),
    ],
)
def test_an_option_that_cannot_be_is_an_error_in_a_line(capsys, options: list[str], problem: str):
    assert main([*YI, *options]) == 1

    assert problem in capsys.readouterr().err
