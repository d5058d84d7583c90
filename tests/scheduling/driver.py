"""Run a scheduler against `HashModel`, with steps in flight, checking what must hold after every call."""

from collections import deque

from rayserve_sarathi.request import FinishReason, Request
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.step import StepInput, StepOutput
from tests.factories import HashModel, make_scheduler


class Driver:
    """A scheduler, the model below it, and what every request received.

    Steps are computed when they are submitted, as a pipeline computes them in that order, and returned in that order.
    """

    def __init__(self, scheduler: Scheduler, *, num_blocks: int, block_size: int, step_s: float = 1.0) -> None:
        self.scheduler = scheduler
        self.requests: dict[str, Request] = {}
        self.tokens: dict[str, list[int]] = {}
        self.finished: dict[str, FinishReason] = {}
        self.steps: list[StepInput] = []
        self.now_s = 0.0
        self._step_s = step_s
        self._num_blocks = num_blocks
        self._block_size = block_size
        self._model = HashModel(num_blocks=num_blocks, block_size=block_size)
        self._pending: deque[StepOutput] = deque()

    @property
    def num_in_flight(self) -> int:
        """Steps submitted and not returned."""
        return len(self._pending)

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add(request)
        self.requests[request.request_id] = request
        self.tokens[request.request_id] = list(request.token_ids[request.num_prompt_tokens :])

    def submit(self) -> StepInput | None:
        """Schedule one step, if there is one."""
        step = self.scheduler.schedule(self.now_s)
        self.scheduler.check_integrity()
        if step is not None:
            self.steps.append(step)
            self._pending.append(self._model.run(step))
        return step

    def land(self) -> None:
        """Return the oldest step in flight."""
        self.now_s += self._step_s
        for output in self.scheduler.update(self._pending.popleft(), self.now_s):
            self.tokens[output.request_id] += output.token_ids
            if output.finish_reason is not None:
                assert output.request_id not in self.finished, "finished twice"
                self.finished[output.request_id] = output.finish_reason
        self.scheduler.check_integrity()

    def restart(self) -> None:
        """Lose the pipeline: its steps and all its KV."""
        self._pending.clear()
        self._model = HashModel(num_blocks=self._num_blocks, block_size=self._block_size)
        self.scheduler.restart()
        self.scheduler.check_integrity()

    def run(self, max_steps: int = 10_000) -> None:
        """Run until nothing is left."""
        for _ in range(max_steps):
            while self.submit() is not None:
                pass
            if not self._pending:
                break
            self.land()
        assert not self.scheduler.has_unfinished_requests, f"not done after {max_steps} steps"


def make_driver(num_blocks: int = 64, block_size: int = 4, **config: object) -> Driver:
    scheduler = make_scheduler(num_blocks=num_blocks, block_size=block_size, **config)  # type: ignore[arg-type]
    return Driver(scheduler, num_blocks=num_blocks, block_size=block_size)


def tokens_of(step: StepInput | None) -> dict[str, int]:
    return {} if step is None else step.num_scheduled_tokens
