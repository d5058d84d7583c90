"""`sarathi trace` against a server."""

import argparse
import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from rayserve_sarathi import trace_command
from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.server import build_app
from rayserve_sarathi.text.tokenizer import Tokenizer
from tests.openai.scripted_engine import ScriptedEngine
from tests.served import served
from tests.tokenizers_for_tests import byte_level_tokenizer


@asynccontextmanager
async def scripted_api(config: IngressConfig) -> AsyncIterator[str]:
    """Serve over a socket; yield the URL."""
    tokenizer = Tokenizer(byte_level_tokenizer())
    card = ModelCard(name="tiny", root="", max_model_len=64, vocab_size=300, created=0, eos_token_ids=frozenset({1}))
    async with served(build_app(ScriptedEngine([5]), tokenizer, card, config)) as url:
        yield url


async def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    trace_command.add_arguments(parser)
    return await asyncio.to_thread(trace_command.run, parser.parse_args(arguments))


async def test_the_file_is_the_trace_of_the_server(tmp_path: Path, capsys):
    output = tmp_path / "trace.json"
    async with scripted_api(IngressConfig(api_keys=("user",), admin_keys=("admin",))) as url:
        status = await command("--url", f"{url}/", "--key", "admin", "--output", str(output))

    assert status == 0
    events = json.loads(output.read_text())["traceEvents"]
    assert {event["args"]["name"] for event in events if event["name"] == "process_name"} == {
        "pipeline a",
        "pipeline b",
    }
    assert f"wrote {len(events)} events to {output}" in capsys.readouterr().out


async def test_a_key_that_opens_other_routes_is_refused_and_writes_nothing(tmp_path: Path, capsys):
    output = tmp_path / "trace.json"
    async with scripted_api(IngressConfig(api_keys=("user",), admin_keys=("admin",))) as url:
        assert await command("--url", url, "--key", "user", "--output", str(output)) == 1

    assert "does not take this key (401); use one of the server's ingress.admin_keys" in capsys.readouterr().err
    assert not output.exists()


async def test_a_server_without_admin_keys_has_no_trace(tmp_path: Path, capsys):
    async with scripted_api(IngressConfig()) as url:
        assert await command("--url", url, "--key", "any", "--output", str(tmp_path / "trace.json")) == 1

    assert "only if ingress.admin_keys is set" in capsys.readouterr().err


async def test_the_key_may_come_from_the_environment(tmp_path: Path, capsys, monkeypatch: pytest.MonkeyPatch):
    output = tmp_path / "trace.json"
    async with scripted_api(IngressConfig(admin_keys=("admin",))) as url:
        monkeypatch.delenv("SARATHI_ADMIN_KEY", raising=False)
        assert await command("--url", url, "--output", str(output)) == 1
        assert (
            "no key; give one of the server's ingress.admin_keys by --key or SARATHI_ADMIN_KEY"
            in capsys.readouterr().err
        )
        monkeypatch.setenv("SARATHI_ADMIN_KEY", "admin")
        assert await command("--url", url, "--output", str(output)) == 0

    assert json.loads(output.read_text())["traceEvents"]


@pytest.mark.parametrize("body", [b"[]", b"{}", b'{"traceEvents": 3}', b"no JSON"])
async def test_an_answer_that_is_no_trace_is_an_error_in_a_line(tmp_path: Path, capsys, body: bytes):
    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-length: %d\r\nconnection: close\r\n\r\n%s" % (len(body), body))
        await writer.drain()
        writer.close()

    output = tmp_path / "trace.json"
    server = await asyncio.start_server(answer, "127.0.0.1", 0)
    async with server:
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        assert await command("--url", url, "--key", "any", "--output", str(output)) == 1

    assert f"error: no trace from {url}: " in capsys.readouterr().err
    assert not output.exists()


async def test_no_server_is_an_error_in_a_line(tmp_path: Path, capsys):
    output = str(tmp_path / "trace.json")
    assert await command("--url", "http://127.0.0.1:1", "--key", "any", "--output", output) == 1

    assert "error: no trace from http://127.0.0.1:1: " in capsys.readouterr().err


async def test_a_file_that_cannot_be_written_is_an_error_in_a_line(tmp_path: Path, capsys):
    async with scripted_api(IngressConfig(admin_keys=("admin",))) as url:
        assert await command("--url", url, "--key", "admin", "--output", str(tmp_path / "none" / "trace.json")) == 1

    assert "No such file or directory" in capsys.readouterr().err
