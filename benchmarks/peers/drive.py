"""Drive an engine with the workloads, and measure; whatever stands for it, a server or an engine in this process."""

import asyncio
import itertools
import time
from collections.abc import Sequence
from typing import Protocol, TypeVar

import numpy as np
from model import Model
from report import Figure
from workloads import Interference, Workload

from rayserve_sarathi.bench.load import Send, Tally, run_closed_loop
from rayserve_sarathi.bench.outcome import Outcome

_WARM_UP_S = 5.0

Body = TypeVar("Body")


class Client(Protocol[Body]):
    """What `CompletionClient` does."""

    def encode(self, prompt_token_ids: Sequence[int], *, num_tokens: int) -> Body:
        """Return a greedy request of a fixed length."""

    async def complete(self, body: Body, *, num_prompt_tokens: int, num_tokens: int, due_s: float) -> Outcome:
        """Send it, and return what became of it."""


async def drive(
    client: Client[Body], model: Model, workloads: Sequence[Workload], interference: Interference | None
) -> dict[str, Figure]:
    """Return the figures of the workloads; without W3's if there is no `interference`.

    Raises:
        RuntimeError: A request failed.
    """
    figures: dict[str, Figure] = {}
    # Compiled, cached, and in its way of every day: HAProxy knows of a new ingress after some seconds.
    _check([await _complete(client, model.prompt(300), 4)])
    warm_up_end_s = time.perf_counter() + _WARM_UP_S
    while time.perf_counter() < warm_up_end_s:
        _check(await asyncio.gather(*(_complete(client, model.prompt(64), 16) for _ in range(16))))
    for workload in workloads:
        seconds = await _run(client, model, workload)
        figures[workload.name] = workload.num_counted(model.name) / seconds
    if interference is not None:
        figures["W3"] = gap_figures(await _interfere(client, model, interference))
    return figures


def gap_figures(gaps: Sequence[float]) -> dict[str, Figure]:
    """Return what counts of gaps in seconds, in milliseconds."""
    p50, p99 = np.quantile(gaps, [0.5, 0.99])
    return {"p50_ms": 1e3 * float(p50), "p99_ms": 1e3 * float(p99), "max_ms": 1e3 * max(gaps)}


async def _run(client: Client[Body], model: Model, workload: Workload) -> float:
    count = workload.num_requests[model.name]
    bodies = [
        client.encode(model.prompt(workload.num_prompt_tokens), num_tokens=workload.num_output_tokens)
        for _ in range(count)
    ]

    def prepare(index: int) -> Send:
        async def send(due_s: float) -> Outcome:
            return await client.complete(
                bodies[index],
                num_prompt_tokens=workload.num_prompt_tokens,
                num_tokens=workload.num_output_tokens,
                due_s=due_s,
            )

        return send

    tally = Tally(num_requests=count)
    await run_closed_loop(prepare, num_clients=workload.num_clients, tally=tally)
    _check(tally.outcomes)
    return tally.duration_s


async def _interfere(client: Client[Body], model: Model, load: Interference) -> list[float]:
    end_s = time.perf_counter() + load.duration_s
    gaps: list[float] = []

    async def decode() -> None:
        while time.perf_counter() < end_s:
            outcome = await _complete(client, model.prompt(load.num_prompt_tokens), load.num_output_tokens)
            _check([outcome])
            times = [time_s for time_s in outcome.token_times_s if time_s < end_s]
            gaps.extend(after - before for before, after in itertools.pairwise(times))

    async def answer_long() -> None:
        # An engine that refused these would have the best gaps of all.
        _check([await _complete(client, model.prompt(load.long_prompt_tokens), load.long_output_tokens)])

    async def interrupt() -> None:
        begin_s = time.perf_counter()
        async with asyncio.TaskGroup() as prompts:
            for number in range(1, int(load.duration_s / load.period_s)):
                await asyncio.sleep(begin_s + number * load.period_s - time.perf_counter())
                prompts.create_task(answer_long())

    async with asyncio.TaskGroup() as group:
        for _ in range(load.num_decoding):
            group.create_task(decode())
        group.create_task(interrupt())
    return gaps


async def _complete(client: Client[Body], prompt: Sequence[int], num_tokens: int) -> Outcome:
    body = client.encode(prompt, num_tokens=num_tokens)
    return await client.complete(body, num_prompt_tokens=len(prompt), num_tokens=num_tokens, due_s=time.perf_counter())


def _check(outcomes: Sequence[Outcome]) -> None:
    for outcome in outcomes:
        if outcome.failure is not None:
            raise RuntimeError(f"a request failed ({outcome.failure.label}): {outcome.failure.message}")
        if outcome.has_usage and outcome.num_output_tokens != outcome.num_tokens_asked:
            raise RuntimeError(f"{outcome.num_output_tokens} tokens came of {outcome.num_tokens_asked}")
