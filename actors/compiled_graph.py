"""The transport by Ray compiled graphs: shared memory between the actors of a CPU deployment, NCCL between GPUs."""

import asyncio
import logging
import pickle
from typing import Any

from ray.dag import InputNode, MultiOutputNode
from ray.exceptions import RayError

from rayserve_sarathi.actors.stage_group import StageGroup, reason_of
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.errors import PipelineFaultError
from rayserve_sarathi.step import StepInput, StepOutput

logger = logging.getLogger(__name__)

_CLOSE_TIMEOUT_S = 5.0
_REST_AFTER_S = 5.0
# Of Ray 2.60: the result of a graph that was closed meanwhile is an error that its own code then tries to iterate over.
_GRAPH_ERRORS = (RayError, TypeError)


class CompiledGraphTransport:
    """See `Transport`.

    The processes of a compiled graph read their channels in a loop that never sleeps (Ray 2.60), which takes up to a
    core each. So on CPUs a graph without steps is taken down after some seconds and compiled again for the next step,
    which then comes a fifth of a second later. On GPUs it stays, as joining NCCL takes longer than that.

    Between nodes Ray 2.60 pushes the messages of several steps in any order: the graph stands still, or a raylet ends
    by a failed check (ray-project/ray#58426). So pipelines that may span nodes go by sockets unless told otherwise.

    Args:
        stages: Whose they are.
        config: The engine's.
        max_steps_inside: Most steps that are submitted and not received.
        max_message_bytes: Size of a channel's buffer; larger messages are slow.
    """

    def __init__(
        self, stages: StageGroup, config: EngineConfig, *, max_steps_inside: int, max_message_bytes: int
    ) -> None:
        self._stages = stages
        self._config = config
        self._max_steps_inside = max_steps_inside
        self._max_message_bytes = max_message_bytes
        self._graph: Any = None
        self._inside: asyncio.Queue[tuple[StepInput, Any]] = asyncio.Queue()
        self._num_inside = 0
        self._lock = asyncio.Lock()

    async def open(self, epoch: int) -> None:
        """Compile the graph."""
        self._inside = asyncio.Queue()
        self._num_inside = 0
        if self._stages.num_nodes > 1:
            logger.warning(
                "the stages are on %d nodes: the compiled graphs of Ray up to 2.60 may stand still between nodes"
                " (ray-project/ray#58426); transport: socket does not",
                self._stages.num_nodes,
            )
        try:
            await self._compile()
        except _GRAPH_ERRORS as error:
            raise _fault(error) from error

    async def submit(self, step: StepInput) -> None:
        """Write the step to the channels of the first stage's ranks."""
        async with self._lock:
            self._num_inside += 1
            try:
                if self._graph is None:
                    await self._compile()
                message = pickle.dumps(step, pickle.HIGHEST_PROTOCOL)
                self._inside.put_nowait((step, await self._graph.execute_async(message)))
            except _GRAPH_ERRORS as error:
                raise _fault(error) from error

    async def receive(self) -> StepOutput:
        """Wait for the oldest step inside."""
        while True:
            try:
                step, results = await asyncio.wait_for(self._inside.get(), _REST_AFTER_S)
                break
            except TimeoutError:
                await self._rest()
        try:
            pickled, *_ = await asyncio.gather(*results)
        except _GRAPH_ERRORS as error:
            raise _fault(error) from error
        self._num_inside -= 1
        output = pickle.loads(pickled)  # from our own stage
        assert isinstance(output, StepOutput), output
        if (output.epoch, output.step_id) != (step.epoch, step.step_id):
            message = f"step {output.step_id} of epoch {output.epoch} came out, where step {step.step_id} was due"
            raise PipelineFaultError(message, reason="lost_message")
        return output

    async def close(self) -> None:
        """Take the graph down."""
        graph, self._graph = self._graph, None
        if graph is None:
            return
        try:
            await asyncio.wait_for(asyncio.to_thread(graph.teardown), _CLOSE_TIMEOUT_S)
        except TimeoutError:
            logger.warning("the compiled graph did not come down within %.0f s", _CLOSE_TIMEOUT_S)

    async def _rest(self) -> None:
        async with self._lock:
            if not self._num_inside and self._config.device == "cpu":
                await self.close()

    async def _compile(self) -> None:
        # Compiling holds the event loop until all stages have answered.
        await self._stages.check_health()
        with InputNode() as step:
            nodes = [rank.execute_first.bind(step) for rank in self._stages.ranks[0]]
            for ranks in self._stages.ranks[1:]:
                if self._config.device == "cuda":
                    nodes = [node.with_tensor_transport(transport="nccl") for node in nodes]
                nodes = [rank.execute.bind(node) for rank, node in zip(ranks, nodes, strict=True)]
            output = MultiOutputNode(nodes)
        self._graph = output.experimental_compile(
            enable_asyncio=True,
            _submit_timeout=self._config.step_timeout_s,
            _buffer_size_bytes=self._max_message_bytes,
            _max_inflight_executions=self._max_steps_inside + 1,
        )


def _fault(error: Exception) -> PipelineFaultError:
    return PipelineFaultError(f"the compiled graph failed ({reason_of(error)})", reason="died")
