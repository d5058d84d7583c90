"""The figures of a run say what happened in it."""

import json
import sys
from pathlib import Path

import pyarrow.parquet
import pytest

from rayserve_sarathi.config import SchedulerConfig
from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.report import render_table, summarise, write_parquet
from rayserve_sarathi.simulation.simulator import make_simulated_scheduler, simulate
from rayserve_sarathi.simulation.virtual_pipeline import ModelledPipeline
from tests.simulation.models import LinearTimes, make_workload_of


def run(*requests: tuple[float, int, int], give_up: Criteria | None = None):
    scheduler = make_simulated_scheduler(
        SchedulerConfig(token_budget=100), num_blocks=50, block_size=4, max_model_len=200, num_stages=1
    )
    times = LinearTimes(base_s=1.0, token_s=0.0, context_s=0.0, cpu=0.0)
    return simulate(make_workload_of(*requests), scheduler, ModelledPipeline(times), give_up=give_up)


def test_figures_are_those_of_the_run_and_json():
    # Steps end at 1, 2, 3, 4, 5: the second request waits half a step for its first, and takes part in three.
    result = run((0.0, 10, 5), (0.5, 20, 3))

    figures = json.loads(json.dumps(summarise(result)))
    assert figures["num_requests"] == 2
    assert figures["duration_s"] == 5
    assert figures["ttft_s"]["mean"] == 1.25
    assert figures["scheduling_delay_s"]["max"] == 0.5
    assert figures["tbt_s"] == {"mean": 1.0, "p50": 1.0, "p90": 1.0, "p99": 1.0, "max": 1.0}
    assert figures["latency_s"]["max"] == 5
    assert figures["normalised_latency_s"]["p50"] == pytest.approx((1.0 + 3.5 / 3) / 2)
    assert figures["output_token_throughput"] == 8 / 5
    assert figures["tokens_per_step"] == (10 + 4 + 20 + 2) / 5
    assert figures["stages"] == [{"busy_s": 5.0, "bubble_s": 0.0, "bubble_share": 0.0}]


def test_the_table_has_the_same_figures():
    table = render_table(run((0.0, 10, 5), (0.5, 20, 3)))

    assert "time to first token      1.2500     1.2500     1.4500     1.4950     1.5000" in table
    assert "2 requests in 5.0 s: 0.400 requests/s, 2 output tokens/s" in table
    assert "5 steps of 7 tokens; 0 preemptions; stages idle with a step in flight: 0.0%" in table
    assert "given up" not in table


def test_a_parquet_file_has_a_row_for_each_request(tmp_path: Path):
    write_parquet(tmp_path / "requests.parquet", run((0.0, 10, 5), (0.5, 20, 3)))

    rows = pyarrow.parquet.read_table(tmp_path / "requests.parquet").to_pylist()
    assert rows[1] == {
        "arrival_s": 0.5,
        "scheduling_delay_s": 0.5,
        "ttft_s": 1.5,
        "latency_s": 3.5,
        "num_prompt_tokens": 20,
        "num_output_tokens": 3,
        "num_preemptions": 0,
    }
    assert len(rows) == 2


def test_where_it_cannot_be_written_is_said(tmp_path: Path):
    with pytest.raises(ConfigError, match=r"cannot write the requests to .*nowhere"):
        write_parquet(tmp_path / "nowhere" / "requests.parquet", run((0.0, 10, 5)))


def test_without_pyarrow_a_parquet_file_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)  # as if it were not installed

    with pytest.raises(ConfigError, match=r"pip install 'rayserve_sarathi\[parquet\]'"):
        write_parquet(tmp_path / "requests.parquet", run((0.0, 10, 5)))


def test_a_run_that_was_given_up_says_so():
    assert "given up" in render_table(run((0.0, 10, 2), (0.0, 10, 90), give_up=Criteria(p99_tbt_s=0.5)))
