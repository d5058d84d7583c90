"""`sarathi capacity --url`, on a real engine behind a socket."""

import asyncio
import json
from pathlib import Path

from rayserve_sarathi.bench.capacity_session import render, to_json
from rayserve_sarathi.bench.live_capacity import LiveProbe
from rayserve_sarathi.cli import main
from rayserve_sarathi.simulation.capacity import Capacity, Trial
from rayserve_sarathi.simulation.criteria import Criteria
from tests.bench.engine_server import MODEL, engine_server

TIMEOUT_S = 60.0
CRITERIA = Criteria(p99_tbt_s=0.1)


async def command(*arguments: str) -> int:
    async with asyncio.timeout(TIMEOUT_S), engine_server() as url:
        load = ("--url", url, "--num-requests", "6", "--lengths", "10,10,4,4")
        return await asyncio.to_thread(main, ["capacity", *load, *arguments])


def read(path: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads(path.read_text())
    return report


async def test_the_search_ends_between_a_rate_that_keeps_up_and_one_that_does_not(tmp_path: Path, capsys):
    path = tmp_path / "a.json"
    # At this tolerance the first two runs that differ are close enough.
    status = await command("--tbt", "60", "--first-rate", "5000", "--tolerance", "1", "--json", str(path))

    assert status == 0
    report = read(path)
    assert (report["capacity"], report["model_id"]) == (10_000, MODEL)
    trials = report["trials"]
    assert isinstance(trials, list)
    assert [(trial["rate"], trial["is_kept_up"], trial["delay_source"]) for trial in trials] == [
        (5000, True, "metrics"),
        (10_000, True, "metrics"),
    ]
    output = capsys.readouterr()
    assert output.out == "capacity 1e+04 requests/s (P99 TBT <= 60 s, median scheduling delay <= 2 s)\n"
    assert "5e+03 requests/s: keeps up, P99 TBT" in output.err


async def test_a_server_that_never_keeps_up_has_no_capacity(tmp_path: Path, capsys):
    path = tmp_path / "a.json"
    # Even a lone request waits for a while, and this rate is the least that is tried.
    options = ("--num-requests", "1", "--tbt", "60", "--delay", "1e-9", "--first-rate", "0.01")
    status = await command(*options, "--json", str(path))

    assert status == 1
    assert read(path)["capacity"] == 0
    output = capsys.readouterr().out
    assert output == "no rate down to 0.01 requests/s keeps P99 TBT <= 60 s, median scheduling delay <= 1e-09 s\n"


def found(probe: LiveProbe) -> Capacity[LiveProbe]:
    trial = Trial(probe.rate, probe, CRITERIA.are_met(probe))
    return Capacity(probe.rate if trial.is_kept_up else 0.0, trial if trial.is_kept_up else None, (trial,))


def test_a_delay_that_is_only_bounded_is_told():
    probe = LiveProbe(
        rate=2.0,
        p99_tbt_s=0.05,
        scheduling_delay_s=0.5,
        delay_source="ttft",
        num_failed=0,
        is_complete=True,
        duration_s=9.0,
    )

    assert "capacity 2 requests/s" in render(found(probe), CRITERIA)
    assert "times to the first token, which are more, stand for them" in render(found(probe), CRITERIA)


def test_a_time_that_never_came_is_null_in_json():
    probe = LiveProbe(
        rate=2.0,
        p99_tbt_s=0.0,
        scheduling_delay_s=float("inf"),
        delay_source="ttft",
        num_failed=3,
        is_complete=False,
        duration_s=9.0,
    )
    (trial,) = json.loads(json.dumps(to_json(found(probe), CRITERIA), allow_nan=False))["trials"]

    assert (trial["median_scheduling_delay_s"], trial["is_kept_up"], trial["failed"]) == (None, False, 3)
