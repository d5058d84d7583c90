"""What the clients of a served checkpoint ask, and how."""

import openai

MAX_TOKENS = 24
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
