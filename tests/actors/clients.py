"""What the clients of a served checkpoint ask, and how."""

import asyncio
from collections.abc import Callable

import openai

MAX_TOKENS = 24
LONG_TOKENS = 80
# Lengths from 4 to 65 tokens.
PROMPTS = [[index + 5] * (5 * index % 31 + 1) + list(range(index, 2 * index + 3)) for index in range(32)]


async def complete(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
    """Return the greedy text after a prompt."""
    answer = await client.completions.create(model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0)
    return answer.choices[0].text


async def stream(client: openai.AsyncOpenAI, prompt: list[int]) -> str:
    """Return the same by way of a stream."""
    chunks = await client.completions.create(
        model="tiny", prompt=prompt, max_tokens=MAX_TOKENS, temperature=0, stream=True
    )
    return "".join([chunk.choices[0].text async for chunk in chunks])


async def streams_through(
    client: openai.AsyncOpenAI, fault: Callable[[], None], *, after_chunks: int = 200
) -> list[str]:
    """Open all streams, cause a fault once some chunks have come, and return what each stream said in the end."""
    num_chunks = 0
    is_time = asyncio.Event()

    async def read(prompt: list[int]) -> str:
        nonlocal num_chunks
        text = ""
        chunks = await client.completions.create(
            model="tiny", prompt=prompt, max_tokens=LONG_TOKENS, temperature=0, stream=True
        )
        async for chunk in chunks:
            text += chunk.choices[0].text
            num_chunks += 1
            if num_chunks == after_chunks:
                is_time.set()
        return text

    reading = [asyncio.create_task(read(prompt)) for prompt in PROMPTS]
    await asyncio.wait_for(is_time.wait(), 60)
    await asyncio.to_thread(fault)
    return await asyncio.wait_for(asyncio.gather(*reading), 150)
