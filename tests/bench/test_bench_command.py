"""`sarathi bench`, from its options to its report."""

import asyncio
import json
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

from rayserve_sarathi.cli import main
from tests.bench.engine_server import MODEL, engine_server
from tests.bench.scripted_server import DONE, event, refusal, scripted_server, silence, stream, token

TIMEOUT_S = 60.0
LENGTHS = ("--lengths", "20,20,6,6")


async def command(*arguments: str) -> int:
    async with asyncio.timeout(TIMEOUT_S):
        return await asyncio.to_thread(main, ["bench", *arguments])


async def report_of(path: Path, *arguments: str) -> dict[str, object]:
    async with engine_server() as url:
        assert await command("--url", url, "--json", str(path), *arguments) == 0
    return read(path)


def read(path: Path) -> dict[str, object]:
    report: dict[str, object] = json.loads(path.read_text())
    return report


async def test_a_load_is_told_in_a_table_and_written_as_json(tmp_path: Path, capsys):
    load = ("--request-rate", "200", "--num-requests", "5", *LENGTHS)
    report = await report_of(tmp_path / "a.json", *load, "--goodput", "ttft:60000", "tbt:60000")

    assert (report["completed"], report["failed"], report["num_prompts"]) == (5, 0, 5)
    assert (report["total_input_tokens"], report["total_output_tokens"]) == (100, 30)
    assert report["model_id"] == MODEL
    assert report["request_goodput"] == report["request_throughput"]
    assert report["goodput_targets_ms"] == {"ttft": 60000, "tbt": 60000}
    for field in ("date", "machine", "command", "seed", "mean_ttft_ms", "p99_tbt_ms", "max_tbt_ms", "p90_e2el_ms"):
        assert field in report
    table = capsys.readouterr().out
    assert "5 complete, 0 failed" in table
    assert "TBT, every gap" in table


async def test_a_detailed_report_has_every_request(tmp_path: Path):
    report = await report_of(tmp_path / "a.json", "--concurrency", "2", "--num-requests", "3", *LENGTHS, "--detailed")

    assert report["input_lens"] == [20, 20, 20]
    assert report["output_lens"] == [6, 6, 6]
    tbts = report["tbts"]
    assert isinstance(tbts, list)
    assert [len(gaps) for gaps in tbts] == [5, 5, 5]
    assert report["errors"] == ["", "", ""]
    assert report["max_concurrency"] == 2


async def test_a_trace_gives_lengths_and_times(tmp_path: Path):
    trace = tmp_path / "trace.csv"
    trace.write_text("arrived_at,num_prefill_tokens,num_decode_tokens\n5.0,64,16\n5.01,32,8\n5.02,8000,9000\n")
    load = ("--arrivals", "recorded", "--num-requests", "2", "--trace", str(trace), "--length-divisor", "8")
    report = await report_of(tmp_path / "a.json", *load, "--detailed")

    # The third does not fit the model.
    assert report["input_lens"] == [8, 4]
    assert report["output_lens"] == [2, 1]


async def test_failures_are_shown_with_an_example_and_nothing_complete_is_an_error_status(tmp_path: Path, capsys):
    first = stream(event(token(num_tokens=1)), event(token(num_tokens=2)), DONE)
    full = refusal("429 Too Many Requests", b'{"error": {"message": "the queue is full"}}', "retry-after: 3")
    models = refusal("200 OK", b'{"data": [{"id": "tiny"}]}')
    none = refusal("404 Not Found", b"")
    async with scripted_server([models, none, first, full]) as url:
        status = await command("--url", url, "--request-rate", "1000", "--num-requests", "3", *LENGTHS)

    assert status == 1
    assert "failed: 3 x status 429: the queue is full (retry after 3 s)" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--model", "gpt"), "does not serve 'gpt'; it serves ['sarathi-tiny']"),
        (("--lengths", "500,500,128,128"), "hardly any request"),
        (("--lengths", "long"), "--lengths is one of"),
        (("--goodput", "itl:3"), "'itl:3' is no goodput target"),
        (("--metric-percentiles", "50,150"), "--metric-percentiles must be numbers from 0 to 100"),
        (("--extra-body", "[]"), "--extra-body must be a JSON object"),
        (("--extra-body", '{"min_tokenz": 3}'), "did you mean min_tokens?"),
        (("--num-requests", "0", *LENGTHS), "at least 1 request, got 0"),
        (("--trace", "/nowhere.csv"), "cannot read the trace /nowhere.csv"),
    ],
)
async def test_a_wrong_option_is_an_error_in_a_line(capsys, arguments: Sequence[str], message: str):
    async with engine_server() as url:
        capsys.readouterr()  # a bar of the weights
        assert await command("--url", url, "--request-rate", "1", *arguments) == 1

    error = capsys.readouterr().err
    assert error.startswith("sarathi: ")
    assert message in error
    assert error.count("\n") == 1


async def test_no_server_is_an_error_in_a_line(capsys):
    assert await command("--url", "http://127.0.0.1:1", "--concurrency", "1") == 1
    assert capsys.readouterr().err.startswith("sarathi: no server at http://127.0.0.1:1: ")


def test_a_load_is_open_or_closed_and_not_both(capsys):
    with pytest.raises(SystemExit):
        main(["bench", "--request-rate", "1", "--concurrency", "2"])
    assert "not allowed with argument" in capsys.readouterr().err


async def test_an_interrupted_load_tells_what_has_ended(tmp_path: Path):
    models = refusal("200 OK", b'{"data": [{"id": "tiny"}]}')
    none = refusal("404 Not Found", b"")
    whole = stream(event(token(num_tokens=1)), event(token(num_tokens=2)), DONE)
    is_silent = asyncio.Event()

    async def fall_silent(writer: asyncio.StreamWriter) -> None:
        is_silent.set()
        await silence(writer)

    path = tmp_path / "a.json"
    async with asyncio.timeout(TIMEOUT_S), scripted_server([models, none, whole, whole, fall_silent]) as url:
        options = ("--url", url, "--concurrency", "1", "--num-requests", "5", *LENGTHS, "--json", str(path))
        program = "import sys; from rayserve_sarathi.cli import main; sys.exit(main())"
        process = await asyncio.create_subprocess_exec(
            sys.executable, "-c", program, "bench", *options, stdout=asyncio.subprocess.PIPE
        )
        await is_silent.wait()
        process.send_signal(signal.SIGINT)
        output, _ = await process.communicate()

    assert process.returncode == 0
    assert b"interrupted: 4 of 5 requests were not sent or had not ended" in output
    report = read(path)
    assert (report["completed"], report["num_interrupted"]) == (1, 4)
