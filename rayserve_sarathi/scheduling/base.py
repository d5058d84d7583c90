"""The scheduler: queues, admission, preemption, steps in flight and progress. A policy fills in which tokens to take.

It follows the public description of Sarathi-Serve (OSDI'24, section 4) with the unified token accounting of vLLM V1:
a request has `num_computed_tokens`, which catches up with `num_tokens`, and nothing else tells prefill from decode.

Order. `order` numbers requests as they arrive. `running` and the preempted are sorted by it, and no request is admitted
before an older one, so the oldest request is always at the front and is never preempted: it always progresses.

Longer than most modules: `schedule` and `update` keep one account of each request, and are read side by side.
"""

import math
from abc import ABC, abstractmethod
from array import array
from bisect import insort
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from itertools import pairwise

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.metrics import SchedulerMetrics, SchedulerState
from rayserve_sarathi.request import FinishReason, Request, RequestOutput
from rayserve_sarathi.scheduling.admission import RequestQueue, check_request, order_of
from rayserve_sarathi.scheduling.ahead import Ahead
from rayserve_sarathi.scheduling.late_tokens import LateGap, LateReport
from rayserve_sarathi.scheduling.pace import pace_of
from rayserve_sarathi.scheduling.packing import build_step_input, has_extras
from rayserve_sarathi.scheduling.plan import StepPlan, count_alike, grow_alike
from rayserve_sarathi.scheduling.token_budget import LONG_PROMPT_BUDGETS, LONG_PROMPT_SHARE
from rayserve_sarathi.step import StepInput, StepOutput, pack_sampling
from rayserve_sarathi.step_shape import StepTimeModel

_new_tuple = tuple.__new__

_MIN_SHARED_LATER = 32
"""Requests whose newest full block a step names at least; at most twice the average of its decodes."""

Chunks = dict[Request, int]
"""Tokens to compute of each request."""


class Scheduler(ABC):
    """The only owner of requests.

    Args:
        config: Limits of a step and of the queues.
        block_manager: The KV blocks, which it takes over.
        max_model_len: Most tokens of a request; the KV pool must hold as many.
        vocab_size: Sampled token ids are below it.
        max_steps_in_flight: Steps that may be submitted before the first returns.
        num_decode_groups: Steps over which the decodes are spread: one for each pipeline stage, so that no step holds
            them all while the other stages have nothing to do.
        epoch: Generation of the pipeline that the steps are for.
        slo: The target for the time between tokens.
        prior: What steps take, as far as that is known, for `token_budget: auto` to begin with.
        is_async: Whether a step is made up while the one before it runs, beyond `max_steps_in_flight`, of tokens that
            are not known yet. For a pipeline of one stage, which has nothing to do meanwhile.
    """

    def __init__(
        self,
        config: SchedulerConfig,
        block_manager: BlockManager,
        *,
        max_model_len: int,
        vocab_size: int,
        max_steps_in_flight: int = 1,
        num_decode_groups: int = 1,
        epoch: int = 0,
        slo: SloConfig | None = None,
        prior: StepTimeModel | None = None,
        is_async: bool = False,
    ) -> None:
        assert not is_async or max_steps_in_flight == num_decode_groups == 1, "stages that wait have other steps"
        num_slots = block_manager.num_blocks * block_manager.block_size
        assert num_slots >= max_model_len, f"{num_slots} KV slots cannot hold a request of {max_model_len} tokens"
        self.config = config
        self.metrics = SchedulerMetrics()
        self._blocks = block_manager
        self.max_model_len = max_model_len
        self._vocab_size = vocab_size
        self._max_steps_in_flight = max_steps_in_flight
        self._num_decode_groups = num_decode_groups
        self._ahead = Ahead() if is_async else None
        self.epoch = epoch
        """Generation of the pipeline that steps are for."""
        self._requests: dict[str, Request] = {}
        self._queue = RequestQueue(config.max_num_waiting)
        self.running: list[Request] = []
        self._in_flight: OrderedDict[int, StepPlan] = OrderedDict()
        self._num_steps = 0
        self._num_added = 0
        self._just_preempted = False
        self._now_s = 0.0
        self._pace = pace_of(
            config,
            slo or SloConfig(),
            max_steps_in_flight=max_steps_in_flight,
            num_stages=num_decode_groups,
            prior=prior,
        )
        self.newest_has_chunks = False
        """Whether the newest step has any tokens but decodes."""

    # What its owner calls.

    def check_capacity(self, num_requests: int, now_s: float) -> None:
        """Return if the queue has room for `num_requests` more; raises what `RequestQueue.check_capacity` does."""
        self._queue.check_capacity(num_requests, now_s)

    def add(self, request: Request) -> None:
        """Queue a request; it is the scheduler's from now on.

        Raises:
            InvalidRequestError: It can never be served.
            OverloadedError: The queue is full.
        """
        check_request(request, max_model_len=self.max_model_len, vocab_size=self._vocab_size)
        self.check_capacity(1, request.arrival_s)
        assert request.request_id not in self._requests, f"{request.request_id} is here already"
        request.order = self._num_added
        self._num_added += 1
        request.sampling_row = pack_sampling(request.sampling)
        request.has_extras = has_extras(request.sampling)
        self._requests[request.request_id] = request
        self._queue.add(request)
        self.metrics.num_started += 1

    def abort(self, request_id: str) -> bool:
        """End a request in any phase; its blocks are free at once, or when its steps in flight have returned.

        Returns:
            Whether it was there; a request that has ended is not.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.ABORT)
        return True

    def stop(self, request_id: str, now_s: float) -> bool:
        """End a request like `abort`, but as one that is complete: whoever reads its text has found its end."""
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._finish(request, FinishReason.STOP, now_s)
        return True

    def schedule(self, now_s: float) -> StepInput | None:
        """Make the next step, which then is in flight until `update`.

        Returns:
            None if there is nothing to compute, or as many steps in flight as there may be.
        """
        plan = self._plan(now_s)
        if plan is None:
            return None
        step = build_step_input(
            plan.decodes,
            plan.prefills,
            plan.sampled_prefills,
            step_id=plan.step_id,
            epoch=self.epoch,
            before=() if self._ahead is None else self._newest_samplers(),
        )
        self._launch(plan)
        return step

    def update(self, step_output: StepOutput, now_s: float) -> list[RequestOutput]:
        """Take the result of the oldest step in flight: advance its requests, end those that are done.

        A result that cannot be right (wrong shape, token outside of the vocabulary) fails the requests of its step.
        """
        step_id, epoch = step_output.step_id, step_output.epoch
        oldest = (next(iter(self._in_flight), None), self.epoch)
        assert (step_id, epoch) == oldest, f"step {step_id} of epoch {epoch} came back, but the oldest is {oldest}"
        step = self._in_flight.pop(step_id)
        if self._ahead is not None:
            self._ahead.note(step.launched_s, now_s)
        num_decodes = len(step.decodes)
        if self._pace is not None:
            self._pace.land(step.decodes, step.prefills, step.sampled_prefills, step_output, self.metrics, now_s)
        fault = step_output.fault
        token_ids = step_output.token_ids.tolist()
        error = (
            fault.message
            if fault is not None
            else self._find_fault(step_output.token_ids.shape, token_ids, num_decodes + len(step.sampled_prefills))
        )
        if error is not None:
            return self._fail_step(step, error, now_s)
        if step_output.prompt_logprobs:
            requests = [*step.decodes, *step.prefills]
            for index, entries in step_output.prompt_logprobs.items():
                requests[index].prompt_logprobs.extend(entries)
        outputs = self._fail_some(step, step_output.errors, now_s) if step_output.errors else []
        outputs += self._update_decodes(step.decodes, token_ids, now_s)
        token_of = dict(zip(step.sampled_prefills, token_ids[num_decodes:], strict=True))
        outputs += self._update_prefills(step.prefills, token_of, now_s)
        self._blocks.share_pending(max(_MIN_SHARED_LATER, 2 * num_decodes // self._blocks.block_size))
        return _attach_logprobs(outputs, step, step_output) if step_output.logprobs else outputs

    # The same without stages that would read a `StepInput`: for the simulator.

    def plan(self, now_s: float) -> StepPlan | None:
        """Make the next step like `schedule`, but do not pack it."""
        plan = self._plan(now_s)
        if plan is not None:
            self._launch(plan)
        return plan

    @property
    def can_advance(self) -> bool:
        """Whether `advance` does what `update` would: not where anything else is kept of steps or blocks."""
        return not self._blocks.enable_prefix_caching and self._pace is None and self._ahead is None

    def num_alike(self, plan: StepPlan) -> int:
        """Return how many steps, beginning with the one in flight, are alike: the same decodes and chunk lengths.

        They are if no request is added, or one is and `can_admit_new` is false. 1 wherever that is not plain.
        """
        if self._max_steps_in_flight > 1 or len(plan.decodes) + len(plan.prefills) < len(self.running):
            return 1
        if self._just_preempted or not self.is_repeated(plan):
            return 1
        return count_alike(plan, block_size=self._blocks.block_size, num_free_blocks=self._blocks.num_free_blocks)

    def can_admit_new(self, plan: StepPlan) -> bool:
        """Whether a request added now might run in the next step: `plan` is not full, and no other waits."""
        return not plan.prefills and not self._queue and len(self.running) < self.config.max_num_seqs

    def advance(self, ends_s: Sequence[float]) -> list[RequestOutput]:
        """Take the oldest step in flight, and `len(ends_s) - 1` more that are alike, as done, at those times.

        The same as `update`, `schedule`, `update` ... at those times with 0 for every token, and no more than
        `num_alike` steps.

        Returns:
            The outputs that end a request.
        """
        _, plan = self._in_flight.popitem(last=False)
        num_steps, end_s = len(ends_s), ends_s[-1]
        decodes = plan.decodes
        if num_steps > 1:
            grow_alike(decodes, num_steps, self._blocks)
            self._num_steps += num_steps - 1
            self._now_s = ends_s[-2]
            self.metrics.iteration_tokens.observe_repeated(plan.num_tokens, num_steps - 1)
            for request, num_new in plan.prefills.items():
                request.num_computed_tokens += (num_steps - 1) * num_new
        self._observe_alike(decodes, ends_s)
        outputs: list[RequestOutput] = []
        tokens = array("i", bytes(4 * num_steps))
        for request in decodes:
            request.num_in_flight_tokens = 0
            request.num_computed_tokens += num_steps
            request.last_token_s = end_s
            token_ids = request.token_ids
            token_ids += tokens
            if len(token_ids) >= request.max_num_tokens:
                outputs.append(RequestOutput(request.request_id, (0,), self._finish_sampled(request, end_s)))
        token_of = dict.fromkeys(plan.sampled_prefills, 0)
        ended = self._update_prefills(plan.prefills, token_of, end_s) if plan.prefills else []
        return outputs + [output for output in ended if output.finish_reason is not None]

    # For its owner again.

    def restart(self) -> None:
        """Begin a new epoch: the pipeline was rebuilt, and with it all KV and every step in flight is gone.

        What ran waits again, in order of arrival, and is computed anew.
        """
        for step in self._in_flight.values():
            for request in (*step.decodes, *step.prefills):
                request.num_in_flight_tokens = 0
                if request.is_aborted:
                    self._blocks.free(request)
        self._in_flight.clear()
        if self._pace is not None:
            self._pace.restart()
        for request in tuple(self.running):
            self._put_back(request, "rebuild")
        self._blocks.forget_content()
        self.epoch += 1

    @property
    def ahead_due_s(self) -> float:
        """When to schedule again though nothing has come back: the step after the one in flight; inf if never."""
        if self._ahead is None or len(self._in_flight) != 1:
            return math.inf
        return self._ahead.due_s(next(iter(self._in_flight.values())).launched_s)

    @property
    def has_unfinished_requests(self) -> bool:
        """Whether any request waits, runs or is in flight."""
        return bool(self._requests or self._in_flight)

    def state(self) -> SchedulerState:
        """Return where it stands; costs time proportional to the requests."""
        return SchedulerState(
            num_requests_running=len(self.running),
            num_requests_waiting=len(self._queue),
            kv_cache_usage=self._blocks.usage,
            prefill_backlog_tokens=sum(
                max(request.num_tokens - request.num_scheduled_tokens, 0) for request in self._requests.values()
            ),
            num_steps_in_flight=len(self._in_flight),
            token_budget=self.token_budget,
        )

    @property
    def token_budget(self) -> int:
        """Most tokens in a step; where it is chosen every step, the mean of the last ones."""
        if self.config.token_budget != "auto":
            return self.config.token_budget
        assert self._pace is not None, "a budget of auto has a pace"
        return self._pace.budget.mean_tokens

    @property
    def tbt_s(self) -> float | None:
        """The target of the time between tokens, in seconds; None if there is none."""
        return None if self._pace is None else self._pace.tbt_s

    def note_late(self, request_id: str, gap: LateGap) -> None:
        """Count a token that came late behind the scheduler, if there is a target; its request may have ended."""
        if self._pace is not None:
            self._pace.note_late(request_id, gap, self.metrics)

    def late_reports(self, request_id: str) -> list[LateReport]:
        """Return which tokens of a request were late, and why; see `LateTokens.reports`."""
        return [] if self._pace is None else self._pace.late_reports(request_id)

    def pack_marks(self) -> bytes:
        """Return what tells others which prefixes are cached here; see `BlockManager.pack_marks`."""
        return self._blocks.pack_marks()

    @property
    def num_waiting(self) -> int:
        """Requests that have never run."""
        return self._queue.num_new

    @property
    def has_queued(self) -> bool:
        """Whether any request waits, new or preempted."""
        return bool(self._queue)

    def reset_metrics(self) -> None:
        """Begin to count from zero; there must be no open request."""
        assert not self._requests, f"{len(self._requests)} requests are open"
        self.metrics = SchedulerMetrics()
        self._queue.forget_finishes()

    def request_ids(self) -> Iterator[str]:
        """Yield the ids of the requests that have not ended."""
        yield from self._requests

    def lose_all(self, error: str) -> list[RequestOutput]:
        """End every request: nothing computes any more."""
        requests = list(self._requests.values())
        for request in requests:
            self._finish(request, FinishReason.LOST)
        return [RequestOutput(request.request_id, finish_reason=FinishReason.LOST, error=error) for request in requests]

    def check_integrity(self) -> None:
        """Raise AssertionError unless queues, blocks and steps in flight agree; costs time proportional to the pool."""
        in_flight = {request for step in self._in_flight.values() for request in (*step.decodes, *step.prefills)}
        self._blocks.check_integrity(list({*self._requests.values(), *in_flight}))
        queued = [*self.running, *self._queue]
        assert {request.request_id for request in queued} == set(self._requests), "a request is in no queue, or in two"
        assert len(queued) == len(self._requests), "a request is in two queues"
        for requests in (self.running, list(self._queue)):
            assert requests == sorted(requests, key=order_of), "a queue is out of order"
        assert all(request.num_in_flight_tokens == 0 for request in self._queue), "a request waits and is in flight"

    # What a policy fills in, and what it builds from.

    @abstractmethod
    def choose(self) -> tuple[list[Request], Chunks]:
        """Return what to compute next: requests that decode a token each, and chunks of requests in prefill.

        Blocks for them are allocated already. Both empty means that there is nothing to compute now.
        """

    def is_repeated(self, plan: StepPlan) -> bool:
        """Whether `plan`, which has all that run, is followed by its like while nothing but its own progress happens.

        Right for policies that look at nothing but requests and blocks; one whose budget changes says False.
        """
        return not plan.prefills

    def take_running(self) -> tuple[list[Request], list[Request]]:
        """Return the running requests that can decode now, with a block for the token, and those in prefill.

        Both oldest first. A request decodes if it lacks nothing but the token it generated last, and is not in flight;
        it is in prefill if it lacks more, some of which is not in flight.

        Where steps are scheduled ahead, a request whose next token is on its way decodes it, unless it is the last one.

        If no block is free for a decode, the newest running request that is not in flight is preempted, which may be
        itself; but while steps are in flight, which may free blocks, none preempts itself. With several decode groups,
        the newest decodes wait for the next step; while as many steps with decodes are in flight as there are groups,
        all wait for the first of them to return.
        """
        decodes: list[Request] = []
        prefills: list[Request] = []
        num_decoding = 0
        block_size = self._blocks.block_size
        # One more group would be one more step until each decode's turn comes again.
        can_decode = sum(bool(step.decodes) for step in self._in_flight.values()) < self._num_decode_groups
        can_go_ahead = is_ahead = self._ahead is not None and bool(self._in_flight)
        for request in tuple(self.running):
            num_tokens = len(request.token_ids)
            num_left = num_tokens - request.num_computed_tokens
            if is_ahead and request.num_in_flight_tokens == num_left:
                if can_go_ahead and num_tokens + 1 < request.max_num_tokens:
                    num_decoding += 1
                    # The first that lacks a block is the next to get one: no newer one may hold its own meanwhile.
                    can_go_ahead = len(request.block_table) * block_size > num_tokens or self._grow(
                        request, num_tokens + 1
                    )
                    if can_go_ahead:
                        decodes.append(request)
            elif num_left == 1 and num_tokens > request.num_prompt_tokens:
                num_decoding += 1
                if request.num_in_flight_tokens or not (can_decode or is_ahead):
                    continue
                if len(request.block_table) * block_size >= num_tokens or self._grow(request, num_tokens):
                    decodes.append(request)
                elif self._pace is not None and request.block_table:
                    self._pace.interrupt(request, "kv_wait")
            elif num_left > request.num_in_flight_tokens:
                prefills.append(request)
        if self._just_preempted:
            prefills = [request for request in prefills if request.block_table]
        del decodes[-(-num_decoding // self._num_decode_groups) :]
        return decodes, prefills

    def take_chunks(self, ongoing: list[Request], budget: int) -> Chunks:
        """Return up to `budget` tokens of requests in prefill, then of new ones, which are admitted for it.

        With `max_num_partial_prefills` above 1, each of that many prompts gets an even share of the budget, so no more
        can be half computed; what short prompts leave of their share goes to the oldest.
        """
        prefills: Chunks = {}
        share = self._share_of_one(ongoing, budget)
        for request in ongoing:
            if budget == 0:
                break
            prefills[request] = min(request.num_tokens - request.num_scheduled_tokens, share, budget)
            budget -= prefills[request]
        while budget and (admitted := self.admit_next()) is not None:
            prefills[admitted] = min(admitted.num_tokens - admitted.num_computed_tokens, share, budget)
            budget -= prefills[admitted]
        for request, num_new in prefills.items():
            extra = min(request.num_tokens - request.num_scheduled_tokens - num_new, budget)
            prefills[request] += extra
            budget -= extra
        return prefills

    def take_prompts(self, limit: int | None = None) -> Chunks:
        """Admit new requests and return all that each lacks, together at most `limit` tokens (None for any number)."""
        prompts: Chunks = {}
        while (admitted := self.admit_next(limit)) is not None:
            prompts[admitted] = admitted.num_tokens - admitted.num_computed_tokens
            if limit is not None:
                limit -= prompts[admitted]
        return prompts

    def num_tokens_to_hold(self, request: Request) -> int:
        """Return for how many tokens a request gets blocks when it is admitted."""
        return request.num_tokens

    def admit_next(self, max_num_new: int | None = None) -> Request | None:
        """Move the oldest request that waits to `running`, with its cached prefix and the blocks for all its tokens.

        Args:
            max_num_new: Most tokens that it may lack; None for any number.

        Returns:
            The request; None if none waits, `max_num_seqs` run, its blocks are not free, it lacks more, or a request
            was preempted in this step (whose blocks are wanted by those that run).
        """
        if self._just_preempted or len(self.running) >= self.config.max_num_seqs:
            return None
        request = self._queue.oldest()
        if request is None:
            return None
        prefix = self._blocks.find_prefix(request)
        if max_num_new is not None and request.num_tokens - len(prefix) * self._blocks.block_size > max_num_new:
            return None
        if not self._blocks.allocate(
            request, prefix, num_tokens=self.num_tokens_to_hold(request), keep_watermark=bool(self.running)
        ):
            return None
        self._queue.remove(request)
        insort(self.running, request, key=order_of)
        request.num_computed_tokens = len(prefix) * self._blocks.block_size
        if self._blocks.can_share(request):
            self.metrics.num_prefix_cache_queries += request.num_tokens
            self.metrics.num_prefix_cache_hits += request.num_computed_tokens
        request.admitted_s = self._now_s
        self.metrics.num_recomputed_tokens += max(request.num_lost_tokens - request.num_computed_tokens, 0)
        request.num_lost_tokens = 0
        if request.first_scheduled_s is None:
            request.first_scheduled_s = self._now_s
            request.num_cached_tokens = min(request.num_computed_tokens, request.num_prompt_tokens)
            self.metrics.num_prompt_tokens += request.num_prompt_tokens
        return request

    def room_for_prompts(self, decodes: list[Request], ongoing: list[Request]) -> int:
        """Return how many tokens of prompts the token budget leaves beside `decodes`.

        Args:
            decodes: Of the step.
            ongoing: Requests in prefill, which come first.
        """
        if self.config.token_budget != "auto":
            return max(self.config.token_budget - len(decodes), 0)
        assert self._pace is not None, "a budget of auto has a pace"
        oldest = self._queue.oldest() if not ongoing else None
        prompts = [oldest] if oldest is not None else ongoing
        if not prompts or (not ongoing and len(self.running) >= self.config.max_num_seqs):
            return 0
        is_decoding = bool(decodes) or any(step.decodes or step.sampled_prefills for step in self._in_flight.values())
        return self._pace.budget.room(decodes, prompts, now_s=self._now_s, is_decoding=is_decoding)

    # The rest is the base's own.

    def _share_of_one(self, ongoing: list[Request], budget: int) -> int:
        share = -(-budget // self.config.max_num_partial_prefills)
        if self.config.token_budget == "auto" and share == budget and ongoing:
            num_left = ongoing[0].num_tokens - ongoing[0].num_scheduled_tokens
            if num_left > LONG_PROMPT_BUDGETS * budget:
                return math.ceil(LONG_PROMPT_SHARE * budget)
        return share

    def _plan(self, now_s: float) -> StepPlan | None:
        if len(self._in_flight) >= self._max_steps_in_flight and now_s < self.ahead_due_s:
            return None
        self._just_preempted = False
        self._now_s = now_s
        decodes, prefills = self.choose()
        if not decodes and not prefills:
            return None
        self.newest_has_chunks = bool(prefills)
        # The sort puts single tokens before longer chunks, as kernels take them together with the decodes.
        prefills = dict(sorted(prefills.items(), key=_is_long))
        sampled_prefills = [
            request
            for request, num_new in prefills.items()
            if request.num_scheduled_tokens + num_new == request.num_tokens
        ]
        return StepPlan(self._num_steps, decodes, prefills, sampled_prefills, now_s)

    def _newest_samplers(self) -> list[Request]:
        """Return the requests that get a token from the newest step in flight, in its order."""
        step = next(reversed(self._in_flight.values()), None)
        return [] if step is None else [*step.decodes, *step.sampled_prefills]

    def _launch(self, plan: StepPlan) -> None:
        if self._pace is not None:
            self._pace.submit(plan.decodes, plan.prefills, self._now_s)
        for request in plan.decodes:
            request.num_in_flight_tokens += 1
        for request, num_new in plan.prefills.items():
            request.num_in_flight_tokens += num_new
        self._in_flight[plan.step_id] = plan
        self._num_steps += 1
        self.metrics.iteration_tokens.observe(plan.num_tokens)

    def _observe_alike(self, decodes: list[Request], ends_s: Sequence[float]) -> None:
        gaps = self.metrics.inter_token_latency_s
        first_s = ends_s[0]
        gaps.observe_all([first_s - request.last_token_s for request in decodes if request.last_token_s is not None])
        if decodes:
            for before_s, end_s in pairwise(ends_s):
                gaps.observe_repeated(end_s - before_s, len(decodes))
        self.metrics.num_generation_tokens += len(decodes) * len(ends_s)

    def _grow(self, request: Request, num_tokens: int) -> bool:
        """Return whether a request has blocks for so many tokens now."""
        while not self._blocks.grow(request, num_tokens):
            victim = self._newest_idle()
            if victim is None or victim.order < request.order:
                return False
            if victim is request and self._in_flight:
                return False  # what returns makes room, or leaves another one to preempt
            self._preempt(victim)
            if victim is request:
                return False
        return True

    def _newest_idle(self) -> Request | None:
        return next((request for request in reversed(self.running) if not request.num_in_flight_tokens), None)

    def _preempt(self, request: Request) -> None:
        assert not request.num_in_flight_tokens, f"{request} is in flight and cannot be preempted"
        self._put_back(request, "recompute")
        self.metrics.num_preemptions += 1
        request.num_preemptions += 1
        self._just_preempted = True

    def _put_back(self, request: Request, cause: str) -> None:
        """Let a running request wait again, without its blocks; `cause` is why its next token will be late."""
        if self._pace is not None:
            self._pace.interrupt(request, cause)
        self.running.remove(request)
        self._blocks.free(request)
        request.num_lost_tokens = request.num_computed_tokens
        request.num_computed_tokens = 0
        request.prompt_logprobs.clear()
        self._queue.put_back(request)

    def _update_decodes(self, decodes: list[Request], token_ids: list[int], now_s: float) -> list[RequestOutput]:
        """The hot path: every line here runs once per generated token."""
        outputs: list[RequestOutput] = []
        gaps_s: list[float] = []
        block_size = self._blocks.block_size
        for request, token_id in zip(decodes, token_ids, strict=False):
            last_token_s = request.last_token_s
            if last_token_s is None:  # resubmitted with the tokens of an earlier scheduler
                outputs += self._update_prefills({request: 1}, {request: token_id}, now_s)
                continue
            request.num_in_flight_tokens -= 1
            if request.is_aborted:
                self._free_aborted(request)
                continue
            gaps_s.append(now_s - last_token_s)
            request.last_token_s = now_s
            request.num_computed_tokens = num_computed = request.num_computed_tokens + 1
            if not num_computed % block_size:
                self._blocks.share_later(request, num_computed - 1)
            tokens = request.token_ids
            tokens.append(token_id)
            request_id = request.request_id
            if num_computed + 1 >= request.max_num_tokens or token_id in request.stop_token_ids:
                outputs.append(RequestOutput(request_id, (token_id,), self._finish_sampled(request, now_s)))
            else:
                # Past the constructor and its defaults, which cost twice as much.
                outputs.append(_new_tuple(RequestOutput, (request_id, (token_id,), None, None, None, 0, None)))
        self.metrics.num_generation_tokens += len(gaps_s)
        self.metrics.inter_token_latency_s.observe_all(gaps_s)
        return outputs

    def _update_prefills(self, chunks: Chunks, token_of: dict[Request, int], now_s: float) -> list[RequestOutput]:
        outputs: list[RequestOutput] = []
        for request, num_new in chunks.items():
            request.num_in_flight_tokens -= num_new
            if request.is_aborted:
                self._free_aborted(request)
                continue
            num_before = request.num_computed_tokens
            request.num_computed_tokens += num_new
            self._blocks.share_computed(request, num_before)
            token_id = token_of.get(request)
            if token_id is not None:
                outputs.append(self._sampled_output(request, token_id, now_s))
        return outputs

    def _sampled_output(self, request: Request, token_id: int, now_s: float) -> RequestOutput:
        """Take the token that ends a prefill: the first one, or the next one after a preemption."""
        is_first = request.last_token_s is None
        if request.last_token_s is not None:
            self.metrics.inter_token_latency_s.observe(now_s - request.last_token_s)
        elif request.sampling.max_tokens:
            self._observe_first_token(request, now_s)
        request.last_token_s = now_s
        if request.sampling.max_tokens == 0:  # only the prompt was wanted
            token_ids: tuple[int, ...] = ()
            reason: FinishReason | None = FinishReason.LENGTH
            self._finish(request, FinishReason.LENGTH, now_s)
        else:
            request.token_ids.append(token_id)
            self.metrics.num_generation_tokens += 1
            token_ids, reason = (token_id,), self._finish_sampled(request, now_s)
        if not is_first:
            return RequestOutput(request.request_id, token_ids, reason)
        return RequestOutput(
            request.request_id,
            token_ids,
            reason,
            prompt_logprobs=None if request.sampling.prompt_logprobs is None else tuple(request.prompt_logprobs),
            num_cached_tokens=request.num_cached_tokens,
        )

    def _observe_first_token(self, request: Request, now_s: float) -> None:
        assert request.first_scheduled_s is not None
        request.first_token_s = now_s
        self.metrics.time_to_first_token_s.observe(now_s - request.arrival_s)
        self.metrics.request_queue_time_s.observe(request.first_scheduled_s - request.arrival_s)
        self.metrics.request_prefill_time_s.observe(now_s - request.first_scheduled_s)

    def _finish_sampled(self, request: Request, now_s: float) -> FinishReason | None:
        if request.token_ids[-1] in request.stop_token_ids:
            reason = FinishReason.STOP
        elif request.num_tokens >= request.max_num_tokens:
            reason = FinishReason.LENGTH
        else:
            return None
        self._finish(request, reason, now_s)
        return reason

    def _free_aborted(self, request: Request) -> None:
        if not request.num_in_flight_tokens:
            self._blocks.free(request)

    def _finish(self, request: Request, reason: FinishReason, now_s: float | None = None) -> None:
        del self._requests[request.request_id]
        if not self._queue.remove(request):
            self.running.remove(request)
        if self._pace is not None:
            self._pace.finish(request)
        if request.num_in_flight_tokens:
            request.is_aborted = True  # its blocks are written to until its steps return
        else:
            self._blocks.free(request)
        self.metrics.num_finished[reason] = self.metrics.num_finished.get(reason, 0) + 1
        if now_s is not None:
            self._queue.note_finish(now_s)
            self.metrics.e2e_request_latency_s.observe(now_s - request.arrival_s)
            if request.first_token_s is not None:
                self.metrics.request_decode_time_s.observe(now_s - request.first_token_s)

    def _find_fault(self, shape: tuple[int, ...], token_ids: list[int], num_samples: int) -> str | None:
        if shape != (num_samples,):
            return f"the last stage returned tokens of shape {shape} for {num_samples} requests"
        if token_ids and not (min(token_ids) >= 0 and max(token_ids) < self._vocab_size):
            return f"the last stage returned a token outside of the vocabulary of {self._vocab_size}"
        return None

    def _fail_some(self, step: StepPlan, errors: dict[int, str], now_s: float) -> list[RequestOutput]:
        """End the requests that failed by themselves. They are in flight still, so that the update drops the rest."""
        requests = [*step.decodes, *step.prefills]
        failed = {requests[index]: error for index, error in errors.items() if not requests[index].is_aborted}
        for request in failed:
            self._finish(request, FinishReason.ERROR, now_s)
        return [
            RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error)
            for request, error in failed.items()
        ]

    def _fail_step(self, step: StepPlan, error: str, now_s: float) -> list[RequestOutput]:
        outputs = []
        for request, num_new in [*((request, 1) for request in step.decodes), *step.prefills.items()]:
            request.num_in_flight_tokens -= num_new
            if request.is_aborted:
                self._free_aborted(request)
                continue
            self._finish(request, FinishReason.ERROR, now_s)
            outputs.append(RequestOutput(request.request_id, finish_reason=FinishReason.ERROR, error=error))
        return outputs


def _attach_logprobs(outputs: list[RequestOutput], step: StepPlan, step_output: StepOutput) -> list[RequestOutput]:
    samplers = [*step.decodes, *step.sampled_prefills]
    entry_of = {samplers[row].request_id: (entry,) for row, entry in step_output.logprobs.items()}
    return [
        output._replace(logprobs=entry_of.get(output.request_id)) if output.token_ids else output for output in outputs
    ]


def _is_long(chunk: tuple[Request, int]) -> bool:
    return chunk[1] > 1
