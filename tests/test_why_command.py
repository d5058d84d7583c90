"""`sarathi why` against a server."""

import argparse
import asyncio

from rayserve_sarathi import why_command
from rayserve_sarathi.config import IngressConfig
from tests.test_trace_command import scripted_api


async def command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    why_command.add_arguments(parser)
    return await asyncio.to_thread(why_command.run, parser.parse_args(arguments))


async def test_it_says_how_many_tokens_were_late_and_who_was_in_the_way(capsys):
    async with scripted_api(IngressConfig(admin_keys=("admin",))) as url:
        assert await command("late", "--url", url, "--key", "admin") == 0

    output = capsys.readouterr().out
    assert "late-0: 3 tokens came later than 0.1 s" in output
    assert "2  bubble: it waited for its turn" in output
    assert "token 20: 0.400 s, prefill of other-0" in output


async def test_a_request_without_late_tokens_is_said_to_be_one(capsys):
    async with scripted_api(IngressConfig(admin_keys=("admin",))) as url:
        assert await command("chatcmpl-1", "--url", url, "--key", "admin") == 0

    assert "no token of chatcmpl-1 was late" in capsys.readouterr().out


async def test_a_wrong_key_and_no_server_are_errors_in_a_line(capsys):
    async with scripted_api(IngressConfig(admin_keys=("admin",))) as url:
        assert await command("late", "--url", url, "--key", "user") == 1
    assert "does not take this key (401)" in capsys.readouterr().err
    assert await command("late", "--url", "http://127.0.0.1:1", "--key", "any") == 1
    assert "error: no answer from http://127.0.0.1:1: " in capsys.readouterr().err
