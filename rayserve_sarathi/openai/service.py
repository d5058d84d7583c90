"""The API without HTTP: the same bodies in and out, as Python objects, for other applications and for the server."""

import time
from collections.abc import AsyncGenerator, Callable, Mapping
from functools import partial

from rayserve_sarathi.config import IngressConfig
from rayserve_sarathi.errors import InvalidRequestError
from rayserve_sarathi.openai.answers import JsonObject, Plan, answer, stream_answer
from rayserve_sarathi.openai.chat import plan_chat
from rayserve_sarathi.openai.completions import plan_completion
from rayserve_sarathi.openai.engine_client import EngineClient
from rayserve_sarathi.openai.logprobs import completion_token
from rayserve_sarathi.openai.model_card import ModelCard
from rayserve_sarathi.openai.prompts import RequestPlanner, off_loop
from rayserve_sarathi.openai.protocol import (
    ChatCompletionRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeChatRequest,
    TokenizeTextRequest,
    parse_body,
)
from rayserve_sarathi.text.tokenizer import Tokenizer


class OpenAIService:
    """Answers the requests of OpenAI's API.

    Closing a stream, or cancelling whoever awaits an answer, aborts what the engine does for it. A `tenant` names whose
    request it is; cached prefixes are never shared between tenants.

    Args:
        clock: Tells the time of answers, in Unix seconds.
        seed: Start of the series of seeds for requests that bring none.
    """

    def __init__(
        self,
        engine: EngineClient,
        tokenizer: Tokenizer,
        model: ModelCard,
        config: IngressConfig,
        *,
        clock: Callable[[], float] = time.time,
        seed: int = 0,
    ) -> None:
        self.engine = engine
        self.model = model
        self._tokenizer = tokenizer
        self._planner = RequestPlanner(tokenizer, model, config, seed=seed)
        self._clock = clock

    async def completions(self, body: Mapping[str, object], *, tenant: str = "") -> JsonObject:
        """Return the answer to a body of `/v1/completions`.

        Raises:
            InvalidRequestError: The request can never be served.
            OverloadedError: The engine is full.
            EngineDeadError: No pipeline is alive.
            EngineFailureError: The engine failed on this request.
        """
        _refuse_stream(body)
        return await answer(self.engine, self._tokenizer, await self._plan_completion(body, tenant))

    def stream_completions(self, body: Mapping[str, object], *, tenant: str = "") -> AsyncGenerator[JsonObject]:
        """Stream the chunks of the answer to a body of `/v1/completions`; raises what `completions` does."""
        make_plan = partial(self._plan_completion, {**body, "stream": True}, tenant)
        return stream_answer(self.engine, self._tokenizer, make_plan)

    async def chat_completions(self, body: Mapping[str, object], *, tenant: str = "") -> JsonObject:
        """Return the answer to a body of `/v1/chat/completions`; raises what `completions` does."""
        _refuse_stream(body)
        return await answer(self.engine, self._tokenizer, await self._plan_chat(body, tenant))

    def stream_chat_completions(self, body: Mapping[str, object], *, tenant: str = "") -> AsyncGenerator[JsonObject]:
        """Stream the chunks of the answer to a body of `/v1/chat/completions`; raises what `completions` does."""
        make_plan = partial(self._plan_chat, {**body, "stream": True}, tenant)
        return stream_answer(self.engine, self._tokenizer, make_plan)

    async def tokenize(self, body: Mapping[str, object]) -> JsonObject:
        """Return the tokens of a text (`prompt`) or of a chat (`messages`)."""
        if "messages" in body:
            chat = parse_body(TokenizeChatRequest, body)
            self._planner.check_model(chat.model)
            messages = [message.flatten() for message in chat.messages]
            prompt = await self._planner.tokenize_chat(messages, chat.chat_options)
            return await self._tokens(prompt.token_ids, has_strings=chat.return_token_strs is True)
        request = parse_body(TokenizeTextRequest, body)
        self._planner.check_model(request.model)
        special = request.add_special_tokens is not False
        token_ids = await off_loop(
            len(request.prompt), lambda: self._tokenizer.encode(request.prompt, add_special_tokens=special)
        )
        return await self._tokens(token_ids, has_strings=request.return_token_strs is True)

    async def detokenize(self, body: Mapping[str, object]) -> JsonObject:
        """Return the text of tokens, special ones included."""
        request = parse_body(DetokenizeRequest, body)
        self._planner.check_model(request.model)
        self._planner.check_token_ids("tokens", request.tokens)
        decode = self._tokenizer.decode
        return {
            "prompt": await off_loop(len(request.tokens), lambda: decode(request.tokens, skip_special_tokens=False))
        }

    def tokenizer_info(self) -> JsonObject:
        """Return what a client needs to tokenise by itself."""
        return {
            **self._tokenizer.info(),
            "eos_token_ids": sorted(self.model.eos_token_ids),
            "max_model_len": self.model.max_model_len,
        }

    def models(self) -> JsonObject:
        """Return the list of the one model."""
        return {"object": "list", "data": [self.model.describe()]}

    def describe_model(self, name: str) -> JsonObject:
        """Return the model of that name.

        Raises:
            ModelNotFoundError: It is not served.
        """
        self._planner.check_model(name)
        return self.model.describe()

    async def _plan_completion(self, body: Mapping[str, object], tenant: str) -> Plan:
        request = parse_body(CompletionRequest, body)
        num_prompts = len(request.prompts)
        self._planner.check_request(request, num_prompts=num_prompts)
        await self.engine.check_capacity(num_prompts * request.num_choices)
        return await plan_completion(
            request, self._planner, self._tokenizer, model=self.model.name, created=int(self._clock()), tenant=tenant
        )

    async def _plan_chat(self, body: Mapping[str, object], tenant: str) -> Plan:
        request = parse_body(ChatCompletionRequest, body)
        self._planner.check_request(request, num_prompts=1)
        await self.engine.check_capacity(request.num_choices)
        return await plan_chat(
            request, self._planner, self._tokenizer, model=self.model.name, created=int(self._clock()), tenant=tenant
        )

    async def _tokens(self, token_ids: list[int], *, has_strings: bool) -> JsonObject:
        def strings() -> list[str]:
            return [completion_token(self._tokenizer, token_id) for token_id in token_ids]

        return {
            "count": len(token_ids),
            "max_model_len": self.model.max_model_len,
            "tokens": token_ids,
            "token_strs": await off_loop(len(token_ids), strings) if has_strings else None,
        }


def _refuse_stream(body: Mapping[str, object]) -> None:
    if body.get("stream") is True:
        raise InvalidRequestError("this call returns one answer; use the streaming one", param="stream")
