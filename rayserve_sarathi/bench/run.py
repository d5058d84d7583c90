"""One load on one server, from the first request to the last token."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TextIO

from rayserve_sarathi.bench.client import CompletionClient, ServedModel
from rayserve_sarathi.bench.load import Send, Tally, run_closed_loop, run_open_loop
from rayserve_sarathi.bench.outcome import Outcome
from rayserve_sarathi.bench.progress import shown_progress
from rayserve_sarathi.bench.prompts import VOCAB_SIZE_EVERYWHERE, Prompts
from rayserve_sarathi.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Load:
    """What to send. All sequences have an entry for each request."""

    num_prompt_tokens: Sequence[int]
    num_output_tokens: Sequence[int]
    arrivals_s: Sequence[float] | None = None
    """When each is sent, in seconds from the beginning; None for a closed loop."""
    num_clients: int = 1
    """Of a closed loop."""

    def __len__(self) -> int:
        return len(self.num_prompt_tokens)


async def run_load(client: CompletionClient, prompts: Prompts, load: Load, *, tally: Tally, stream: TextIO) -> None:
    """Send all requests and wait for their ends.

    Args:
        client: Of the server.
        prompts: Where prompts come from.
        load: What to send.
        tally: Gets the outcomes.
        stream: Where to show how far it is.
    """

    def prepare(index: int) -> Send:
        prompt = prompts.make(index, load.num_prompt_tokens[index])
        num_tokens = load.num_output_tokens[index]
        body = client.encode(prompt, num_tokens=num_tokens)

        async def send(due_s: float) -> Outcome:
            return await client.complete(body, num_prompt_tokens=len(prompt), num_tokens=num_tokens, due_s=due_s)

        return send

    async with shown_progress(tally, num_tokens=lambda: client.num_tokens, stream=stream):
        if load.arrivals_s is None:
            await run_closed_loop(prepare, num_clients=load.num_clients, tally=tally)
        else:
            await run_open_loop(prepare, load.arrivals_s, tally)


async def find_model(url: str, name: str | None, *, key: str | None) -> ServedModel:
    """Return the model of that name; the only one that is served if the name is None.

    Raises:
        ConfigError: It is not served, or there is no server.
    """
    async with CompletionClient(url, model="", key=key) as client:
        models = await client.models()
    names = [model.name for model in models]
    if name is None and len(models) != 1:
        raise ConfigError(f"{url} serves {len(models)} models; choose one of {names} by --model")
    for model in models:
        if name in (None, model.name):
            return model
    raise ConfigError(f"{url} does not serve {name!r}; it serves {names}")


async def make_prompts(client: CompletionClient, *, vocab_size: int | None, seed: int | None) -> Prompts:
    """Return a source of prompts.

    Args:
        client: Of the server, which is asked for the size of its vocabulary.
        vocab_size: Where it is known; None asks the server, or else takes what every model has.
        seed: See `Prompts`.
    """
    if vocab_size is None:
        vocab_size = await client.vocab_size() or VOCAB_SIZE_EVERYWHERE
    return Prompts(vocab_size=vocab_size, seed=seed)


async def warm_up(client: CompletionClient, prompts: Prompts, *, num_requests: int) -> None:
    """Send short requests whose times do not count, one after the other.

    Raises:
        ConfigError: One failed, and so would all others.
    """
    for index in range(num_requests):
        # Beyond the indices of the load, so that its prompts are new to the server.
        prompt = prompts.make(2**31 + index, 4)
        body = client.encode(prompt, num_tokens=2)
        outcome = await client.complete(body, num_prompt_tokens=len(prompt), num_tokens=2, due_s=time.perf_counter())
        if outcome.failure is not None:
            raise ConfigError(
                f"a first small request to {client.url} failed ({outcome.failure.label}): {outcome.failure.message}"
            )
