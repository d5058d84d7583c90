"""What the official client makes of our answers."""

from collections.abc import AsyncIterator, Callable

import httpx2
import openai
import pytest
from openai import AsyncOpenAI

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.errors import OverloadedError
from tests.openai.conftest import Api

HELLO = [{"role": "user", "content": "hello"}]


def connect(api: Api, api_key: str = "none") -> AsyncOpenAI:
    http_client = httpx2.AsyncClient(transport=httpx2.ASGITransport(app=api.app))
    return AsyncOpenAI(base_url="http://test/v1", api_key=api_key, http_client=http_client, max_retries=0)


@pytest.fixture
async def client(make_api: Callable[..., Api]) -> AsyncIterator[AsyncOpenAI]:
    async with connect(make_api(ends=True, num_cached_tokens=3)) as connected:
        yield connected


async def test_a_chat_is_answered(client: AsyncOpenAI):
    answer = await client.chat.completions.create(model="tiny", messages=HELLO, logprobs=True, top_logprobs=2)

    choice = answer.choices[0]
    assert choice.message.content == "one, two, three"
    assert choice.finish_reason == "stop"
    assert choice.logprobs is not None
    assert choice.logprobs.content is not None
    assert len(choice.logprobs.content[0].top_logprobs) == 2
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    assert answer.usage.prompt_tokens_details.cached_tokens == 3


async def test_a_chat_is_streamed(client: AsyncOpenAI):
    stream = await client.chat.completions.create(
        model="tiny", messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = [chunk async for chunk in stream]

    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks[:-1]) == "one, two, three"
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert all(chunk.usage is None for chunk in chunks[:-1])


async def test_an_answer_can_be_sent_back_as_it_is(client: AsyncOpenAI):
    answer = await client.chat.completions.create(model="tiny", messages=HELLO)
    history = [*HELLO, answer.choices[0].message.model_dump(), {"role": "user", "content": "and?"}]

    again = await client.chat.completions.create(model="tiny", messages=history)  # type: ignore[arg-type]  # as clients do

    assert again.choices[0].message.content == "one, two, three"


async def test_a_text_is_completed_and_streamed(client: AsyncOpenAI):
    answer = await client.completions.create(model="tiny", prompt=["a", "b"], n=2, logprobs=1)
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]
    assert {choice.text for choice in answer.choices} == {"one, two, three"}

    stream = await client.completions.create(model="tiny", prompt="a", stream=True)
    assert "".join([chunk.choices[0].text async for chunk in stream]) == "one, two, three"


async def test_models_are_listed(client: AsyncOpenAI):
    assert [model.id async for model in await client.models.list()] == ["tiny"]
    assert (await client.models.retrieve("tiny")).id == "tiny"


async def test_errors_have_the_clients_classes(make_api: Callable[..., Api]):
    api = make_api(config=IngressConfig(api_keys=("right",)))
    async with connect(api, "wrong") as client:
        with pytest.raises(openai.AuthenticationError):
            await client.models.list()
    async with connect(api, "right") as client:
        with pytest.raises(openai.NotFoundError, match="does not exist"):
            await client.completions.create(model="other", prompt="a")
        with pytest.raises(openai.BadRequestError, match="maximum context length is 64 tokens") as caught:
            await client.completions.create(model="tiny", prompt="a", max_tokens=1000)
        assert caught.value.code == "context_length_exceeded"
        api.engine.capacity_error = OverloadedError("the queue is full", retry_after_s=2.5)
        with pytest.raises(openai.RateLimitError) as limited:
            await client.completions.create(model="tiny", prompt="a")
        assert limited.value.response.headers["retry-after"] == "3"


async def test_an_error_inside_a_stream_is_raised(make_api: Callable[..., Api]):
    async with connect(make_api(fails_after=2)) as client:
        stream = await client.completions.create(model="tiny", prompt="a", stream=True)
        with pytest.raises(openai.APIError, match="the engine failed on this request"):
            [chunk async for chunk in stream]
