"""Offline generation in one process, without Ray: `LLM(model).generate(prompts)`."""

import asyncio
import random
import sys
import threading
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import dataclass, replace
from operator import index
from typing import Any, NoReturn, Self, TypeVar, cast

from tqdm import tqdm

from rayserve_sarathi.config import EngineConfig, parse
from rayserve_sarathi.engine import check_names, make_scheduler
from rayserve_sarathi.errors import ConfigError, EngineDeadError, InvalidRequestError, SarathiError
from rayserve_sarathi.execution.inline import make_inline_pipeline
from rayserve_sarathi.local_engine import LocalEngine
from rayserve_sarathi.models.resolve import find_tokenizer, resolve_model
from rayserve_sarathi.request import MAX_TOKEN_ID, FinishReason, SamplingParams, TokenLogprobs
from rayserve_sarathi.text.chat_template import ChatOptions
from rayserve_sarathi.text.tokenizer import load_tokenizer

Prompt = str | Sequence[int]

_T = TypeVar("_T")


@dataclass(frozen=True, slots=True, kw_only=True)
class Generation:
    """What came of one prompt.

    Args:
        prompt_token_ids: The prompt.
        token_ids: Generated tokens, the one that ended the text included.
        text: Their text, without special tokens.
        finish_reason: Why it ended.
        num_cached_tokens: Prompt tokens whose KV was there already.
        logprobs: One entry for each generated token, if asked for.
        prompt_logprobs: One entry for each prompt token but the first, if asked for.
    """

    prompt_token_ids: tuple[int, ...]
    token_ids: tuple[int, ...]
    text: str
    finish_reason: FinishReason
    num_cached_tokens: int
    logprobs: tuple[TokenLogprobs, ...] | None
    prompt_logprobs: tuple[TokenLogprobs, ...] | None


class LLM:
    """A model and the same scheduler, KV cache and kernels that serve online.

    Args:
        model: Local folder or hub id of a checkpoint, or `sarathi-tiny`.
        settings: Fields of `EngineConfig`; `scheduler` is a mapping, as in a deployment file.

    Raises:
        ConfigError: A setting is unknown or impossible.
    """

    def __init__(self, model: str, **settings: Any) -> None:
        config = parse(EngineConfig, {"model": model, "transport": "inline", **settings})
        if config.transport != "inline":
            raise ConfigError(f"transport {config.transport} needs Ray; offline use has inline alone")
        check_names(config)
        # The queue's limit protects a server from its clients; here there is only the caller.
        config = replace(config, scheduler=replace(config.scheduler, max_num_waiting=sys.maxsize))
        info = resolve_model(config)
        self._tokenizer = load_tokenizer(
            find_tokenizer(config, info),
            revision=config.revision,
            trust_remote_code=config.trust_remote_code,
            chat_template=config.chat_template,
        )
        pipeline, num_blocks = make_inline_pipeline(config)
        self._engine = LocalEngine(
            make_scheduler(config, info, num_blocks=num_blocks),
            pipeline,
            eos_token_ids=info.eos_token_ids,
            model_name=config.model_name,
        )
        self._num_requests = 0
        self._seeds = random.Random(config.seed)
        # A loop on a thread of its own, so that it also works where a loop is running already, as in a notebook.
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="llm", daemon=True)
        self._thread.start()
        self._call(self._engine.__aenter__())
        # Also when nobody calls `close`: at the end of the process, or when the last reference goes.
        self._finalizer = weakref.finalize(self, _stop, self._engine, self._loop, self._thread)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def metrics(self) -> str:
        """Return what the scheduler counted, in Prometheus's text format."""
        return self._call(self._engine.metrics())

    def close(self) -> None:
        """Stop the engine; requests that are still open fail."""
        self._finalizer()

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        has_progress_bar: bool = True,
    ) -> list[Generation]:
        """Continue each prompt.

        Args:
            prompts: Texts or token ids; one or many.
            sampling: For all, or one for each; None takes the defaults.
            has_progress_bar: Whether to show one on stderr.

        Returns:
            One generation for each prompt, in the order given.

        Raises:
            InvalidRequestError: A prompt can never be served.
        """
        many = _as_list(prompts)
        token_ids = [self._tokenizer.encode(prompt) if isinstance(prompt, str) else _as_ids(prompt) for prompt in many]
        return self._run(token_ids, sampling, has_progress_bar=has_progress_bar)

    def chat(
        self,
        messages: Sequence[Mapping[str, str]],
        sampling: SamplingParams | None = None,
        *,
        has_progress_bar: bool = False,
    ) -> Generation:
        """Answer a conversation, by the chat template of the model.

        Args:
            messages: Each with `role` and `content`.
            sampling: None takes the defaults.
            has_progress_bar: Whether to show one on stderr.
        """
        prompt = self._tokenizer.encode_chat(messages, ChatOptions())
        return self._run([prompt], sampling, has_progress_bar=has_progress_bar)[0]

    def _run(
        self,
        prompts: list[list[int]],
        sampling: SamplingParams | Sequence[SamplingParams] | None,
        *,
        has_progress_bar: bool,
    ) -> list[Generation]:
        each = [sampling or SamplingParams()] * len(prompts) if not isinstance(sampling, Sequence) else list(sampling)
        if len(each) != len(prompts):
            raise InvalidRequestError(f"{len(each)} sampling parameters were given for {len(prompts)} prompts")
        with tqdm(total=len(prompts), desc="requests", unit="request", disable=not has_progress_bar) as progress:
            return self._call(self._run_all(prompts, each, progress))

    def _call(self, coroutine: Coroutine[Any, Any, _T]) -> _T:
        if not self._thread.is_alive():
            coroutine.close()
            raise EngineDeadError("this LLM is closed")
        future = asyncio.run_coroutine_threadsafe(coroutine, self._loop)
        try:
            return future.result()
        except BaseException:  # Ctrl-C too: what nobody waits for any more must not run on
            future.cancel()
            raise

    async def _run_all(
        self, prompts: list[list[int]], sampling: list[SamplingParams], progress: "tqdm[NoReturn]"
    ) -> list[Generation]:
        try:
            async with asyncio.TaskGroup() as group:
                tasks = [
                    group.create_task(self._run_one(prompt, one, progress))
                    for prompt, one in zip(prompts, sampling, strict=True)
                ]
        except* SarathiError as errors:
            raise errors.exceptions[0] from None
        return [task.result() for task in tasks]

    async def _run_one(self, prompt: list[int], sampling: SamplingParams, progress: "tqdm[NoReturn]") -> Generation:
        self._num_requests += 1
        if sampling.seed is None:
            sampling = replace(sampling, seed=self._seeds.getrandbits(64))
        outputs = [output async for output in self._engine.generate(f"llm-{self._num_requests}", prompt, sampling)]
        progress.update()
        first, last = outputs[0], outputs[-1]
        if last.finish_reason is None or last.finish_reason is FinishReason.ERROR:
            raise EngineDeadError(last.error or "the request ended without a reason")
        token_ids = tuple(token_id for output in outputs for token_id in output.token_ids)
        # The token that ended the text is not part of it.
        text_ids = token_ids[:-1] if last.finish_reason is FinishReason.STOP else token_ids
        logprobs = [entry for output in outputs for entry in output.logprobs or ()]
        return Generation(
            prompt_token_ids=tuple(prompt),
            token_ids=token_ids,
            text=self._tokenizer.decode(text_ids),
            finish_reason=last.finish_reason,
            num_cached_tokens=first.num_cached_tokens,
            logprobs=None if sampling.logprobs is None else tuple(logprobs),
            prompt_logprobs=first.prompt_logprobs,
        )


def _stop(engine: LocalEngine, loop: asyncio.AbstractEventLoop, thread: threading.Thread) -> None:
    asyncio.run_coroutine_threadsafe(engine.__aexit__(None, None, None), loop).result()
    loop.call_soon_threadsafe(loop.stop)
    thread.join()
    loop.close()


def _as_list(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if len(prompts) and hasattr(prompts[0], "__index__"):
        return [cast(Sequence[int], prompts)]
    return list(cast(Sequence[Prompt], prompts))


def _as_ids(prompt: Sequence[int]) -> list[int]:
    """Return token ids as plain integers; numpy's and torch's count as such."""
    try:
        token_ids = [index(token_id) for token_id in prompt]
    except TypeError:
        raise InvalidRequestError(
            f"a prompt must be a text or token ids, got {prompt!r:.200}", param="prompt"
        ) from None
    if token_ids and not (min(token_ids) >= 0 and max(token_ids) <= MAX_TOKEN_ID):
        raise InvalidRequestError(f"token ids must be from 0 to {MAX_TOKEN_ID}, got {prompt!r:.200}", param="prompt")
    return token_ids
