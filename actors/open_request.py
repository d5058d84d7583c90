"""A request as its ingress holds it: all that is needed to submit it, and to submit it again."""

import asyncio
from array import array
from dataclasses import replace

from rayserve_sarathi.actors.messages import Submission
from rayserve_sarathi.errors import SarathiError
from rayserve_sarathi.kv.prefix_marks import PrefixMarks
from rayserve_sarathi.request import RequestOutput, SamplingParams
from rayserve_sarathi.routing import Call


class OpenRequest:
    """Prompt, tokens so far, and the outputs that its client has not read yet.

    Args:
        request_id: Unique in this ingress.
        prompt_token_ids: The prompt.
        sampling: How to choose tokens; with a seed, so that another pipeline chooses the same ones.
        cache_salt: See `Request`.
        prefix: The prompt's marks.
    """

    def __init__(
        self,
        request_id: str,
        prompt_token_ids: "array[int]",
        sampling: SamplingParams,
        *,
        cache_salt: str,
        prefix: PrefixMarks,
    ) -> None:
        self._request_id = request_id
        self._prompt_token_ids = prompt_token_ids
        self._sampling = sampling
        self._cache_salt = cache_salt
        self.prefix = prefix
        self._token_ids = array("i")
        self._outputs: asyncio.Queue[RequestOutput | SarathiError] = asyncio.Queue()
        self._num_attempts = 0
        self._waits_since_s: float | None = None
        self._call: Call | None = None
        self._is_answered = False
        self.attempt_id = ""
        self.pipeline: str | None = None
        """Where it is; None on the way there."""
        self.num_losses = 0
        """Pipelines lost since its last token."""
        self.is_closed = False
        self.is_stopped = False
        """Closed as its text is complete."""
        self.is_finished = False

    @property
    def was_lost(self) -> bool:
        """Whether a pipeline had taken it already, so that it is not to be refused like a new one."""
        return self.num_losses > 0

    def begin_attempt(self) -> str:
        """Return an id that no scheduler has seen: an earlier one may still run the request, and is not to be heard."""
        self._num_attempts += 1
        self.attempt_id = self._request_id if self._num_attempts == 1 else f"{self._request_id}~{self._num_attempts}"
        self.pipeline = None
        self.leave_call()
        return self.attempt_id

    def join(self, call: Call) -> None:
        """Travel with a call, and count in it what comes of this request."""
        self._call = call
        self._is_answered = False
        call.num_waiting += 1
        call.num_open += 1

    def leave_call(self) -> None:
        """Count as neither waiting nor open any longer."""
        if self._call is not None:
            self._note_answer()
            self._call.num_open -= 1
            self._call = None

    def _note_answer(self) -> None:
        if self._call is not None and not self._is_answered:
            self._is_answered = True
            self._call.num_waiting -= 1

    def settle(self, pipeline: str) -> None:
        """Hear which pipeline has taken it."""
        self.pipeline = pipeline
        self._waits_since_s = None

    def submission(self) -> Submission:
        """Return what a scheduler needs to begin, or to go on."""
        has_begun = len(self._token_ids) > 0
        return Submission(
            request_id=self.attempt_id,
            prompt_token_ids=self._prompt_token_ids,
            # The client has those of the prompt with the first token.
            sampling=replace(self._sampling, prompt_logprobs=None) if has_begun else self._sampling,
            cache_salt=self._cache_salt,
            output_token_ids=self._token_ids[:],
            prefix=self.prefix,
        )

    def put(self, output: RequestOutput) -> None:
        """Take what a step did."""
        if self._token_ids and output.num_cached_tokens:
            output = output._replace(num_cached_tokens=0)  # found again after a loss; the client was told before
        self._token_ids.extend(output.token_ids)
        self.num_losses = 0
        self._waits_since_s = None
        self._note_answer()
        self.is_finished = output.finish_reason is not None
        if self.is_finished:
            self.leave_call()
        self._outputs.put_nowait(output)

    def fail(self, error: SarathiError) -> None:
        """Let the reader have an error after what has come."""
        self.leave_call()
        self._outputs.put_nowait(error)

    def waits_since(self, now_s: float) -> float:
        """Return since when no pipeline has it, on the clock of `now_s`."""
        if self._waits_since_s is None:
            self._waits_since_s = now_s
        return self._waits_since_s

    async def next_output(self) -> RequestOutput:
        """Return the next output, once there is one; raises what `fail` was given."""
        output = await self._outputs.get()
        if isinstance(output, SarathiError):
            raise output
        return output
