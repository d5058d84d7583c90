"""Loads on a real engine behind a real socket: the tiny model, its scheduler, and the HTTP API."""

import asyncio
import io
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest

from rayserve_sarathi.bench.client import CompletionClient, ServedModel
from rayserve_sarathi.bench.load import Tally
from rayserve_sarathi.bench.prompts import Prompts
from rayserve_sarathi.bench.run import Load, find_model, make_prompts, run_load, warm_up
from rayserve_sarathi.bench.server_metrics import read_queue_times
from rayserve_sarathi.bench.summary import summarise
from rayserve_sarathi.errors import ConfigError
from tests.bench.engine_server import MODEL, engine_server
from tests.bench.scripted_server import refusal, scripted_server

TIMEOUT_S = 60.0


@asynccontextmanager
async def connected(**settings: object) -> AsyncIterator[tuple[CompletionClient, Prompts]]:
    async with (
        asyncio.timeout(TIMEOUT_S),
        engine_server(**settings) as url,
        CompletionClient(url, model=MODEL) as client,
    ):
        yield client, await make_prompts(client, vocab_size=None, seed=0)


async def run(client: CompletionClient, prompts: Prompts, load: Load) -> Tally:
    tally = Tally(num_requests=len(load))
    await run_load(client, prompts, load, tally=tally, stream=io.StringIO())
    return tally


def check_lengths(load: Load, tally: Tally) -> None:
    outcomes = sorted(tally.outcomes, key=lambda outcome: outcome.due_s)
    assert [outcome.failure for outcome in outcomes] == [None] * len(load)
    assert [outcome.num_prompt_tokens for outcome in outcomes] == list(load.num_prompt_tokens)
    assert [outcome.num_output_tokens for outcome in outcomes] == list(load.num_output_tokens)
    assert [len(outcome.token_times_s) for outcome in outcomes] == list(load.num_output_tokens)


async def test_every_token_of_an_open_loop_is_seen():
    load = Load(num_prompt_tokens=[3, 40, 1, 17], num_output_tokens=[9, 1, 30, 4], arrivals_s=[0.0, 0.01, 0.01, 0.02])
    async with connected() as (client, prompts):
        tally = await run(client, prompts, load)
        text = await client.metrics()

    check_lengths(load, tally)
    assert client.num_tokens == 44
    summary = summarise(tally.outcomes, duration_s=tally.duration_s, percentiles=[99.0])
    assert (summary.num_input_tokens, summary.num_output_tokens) == (61, 44)
    # The server's own count of the same load.
    assert text is not None
    queue_times = read_queue_times(text)
    assert queue_times is not None
    assert queue_times.count == 4


async def test_every_token_of_a_closed_loop_is_seen():
    load = Load(num_prompt_tokens=[5] * 6, num_output_tokens=[7] * 6, num_clients=2)
    async with connected() as (client, prompts):
        tally = await run(client, prompts, load)

    check_lengths(load, tally)
    summary = summarise(tally.outcomes, duration_s=tally.duration_s, percentiles=[99.0])
    assert summary.max_concurrent_requests == 2


async def test_requests_beyond_the_queue_are_refused_and_counted():
    load = Load(num_prompt_tokens=[30] * 8, num_output_tokens=[30] * 8, arrivals_s=[0.0] * 8)
    async with connected(scheduler={"max_num_waiting": 1, "max_num_seqs": 1}) as (client, prompts):
        tally = await run(client, prompts, load)

    summary = summarise(tally.outcomes, duration_s=tally.duration_s, percentiles=[99.0])
    assert summary.num_completed + summary.num_failed == 8
    assert set(summary.failures) == {"status 429"}
    refused = next(outcome.failure for outcome in tally.outcomes if outcome.failure is not None)
    assert refused.retry_after_s is not None


async def test_prompts_are_of_the_servers_vocabulary_and_new_to_it():
    async with connected() as (client, prompts):
        others = await make_prompts(client, vocab_size=None, seed=None)
        assert prompts.vocab_size == await client.vocab_size()

    assert max(prompts.make(0, 1000)) < prompts.vocab_size
    assert prompts.make(0, 8) == prompts.make(0, 8) != prompts.make(1, 8)
    assert others.make(0, 8) != prompts.make(0, 8)


async def test_the_only_model_needs_no_name_and_a_wrong_one_is_told_the_right():
    async with asyncio.timeout(TIMEOUT_S), engine_server() as url:
        assert await find_model(url, None, key=None) == ServedModel(name=MODEL, max_model_len=512)
        assert (await find_model(f"{url}/", MODEL, key=None)).name == MODEL
        with pytest.raises(ConfigError, match=f"does not serve 'gpt'; it serves \\['{MODEL}'\\]"):
            await find_model(url, "gpt", key=None)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("http://127.0.0.1:1", "no server at http://127.0.0.1:1: "),
        ("127.0.0.1:8000", "no URL; use one such as http://127.0.0.1:8000"),
        ("nonsense", "no URL; use one such as http://127.0.0.1:8000"),
    ],
)
async def test_no_server_is_an_error_that_names_the_url(url: str, message: str):
    with pytest.raises(ConfigError, match=message):
        await find_model(url, None, key=None)


async def test_a_server_that_refuses_the_first_request_is_an_error_with_its_reason():
    answer = refusal("400 Bad Request", b'{"error": {"message": "unknown field ignore_eos"}}')
    async with scripted_server([answer]) as url, CompletionClient(url, model="tiny") as client:
        with pytest.raises(ConfigError, match=r"failed \(status 400\): unknown field ignore_eos"):
            await warm_up(client, Prompts(vocab_size=100), num_requests=1)
