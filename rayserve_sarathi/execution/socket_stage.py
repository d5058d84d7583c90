"""A stage that is joined to its neighbours by sockets: a thread each to receive, to compute and to send."""

import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from queue import SimpleQueue
from typing import Protocol

import numpy as np
from torch import Tensor

from rayserve_sarathi.errors import PipelineFaultError, WireError
from rayserve_sarathi.execution.activations import ActivationPath, InMessage, pack, unpack
from rayserve_sarathi.execution.sockets import Address, Connection, Listener, connect
from rayserve_sarathi.execution.stage import LaunchedStep, StageMessage
from rayserve_sarathi.execution.wire import Frame, Message, encode
from rayserve_sarathi.step import StepFault, StepInput, StepOutput

logger = logging.getLogger(__name__)

_Arrival = tuple[StageMessage, Callable[[], Tensor] | None, float]
"""A message without its hidden states, what waits for these, and when the message was complete."""


class Executor(Protocol):
    """What a `Stage` is to its sockets."""

    @property
    def index(self) -> int:
        """Which stage, from 0."""

    def launch(self, message: StageMessage, receive_s: float | None = None) -> StageMessage | StepOutput | LaunchedStep:
        """See `Stage`."""


class StepOrder:
    """Whether each step follows the one before it.

    Args:
        epoch: Steps of an older one are out of date.
    """

    def __init__(self, epoch: int) -> None:
        self._epoch = epoch
        self._step_id: int | None = None  # None before the epoch's first step

    def is_old(self, step: StepInput) -> bool:
        """Whether a step is of an older epoch, and to be dropped."""
        return step.epoch < self._epoch

    def find_fault(self, step: StepInput) -> str | None:
        """Take a step, which is not old; return why it cannot be computed, None if it can."""
        if step.epoch > self._epoch:
            self._epoch, self._step_id = step.epoch, None
        before = self._step_id
        if before is None or step.step_id == before + 1:
            self._step_id = step.step_id
            return None
        self._step_id = max(before, step.step_id)
        if step.step_id > before:
            return f"steps {before + 1} to {step.step_id - 1} were lost before step {step.step_id}"
        return f"step {step.step_id} came again or too late, after step {before}"


class SocketStage:
    """Takes steps from one neighbour, computes them, and passes them to the next, until a connection closes.

    It listens from the start. `connect` it, unless nothing is behind it, then `run` it, in a thread of the caller's.
    To join the stage to others, wait until `run` has returned and make a new one: two would compute in it at once.

    Args:
        stage: Computes; started.
        name: Who this is, for messages.
        host: Where to listen, and what to tell the neighbour.
        secret: Known to the processes of this pipeline alone; better a new one for each epoch.
        epoch: Steps of an older one are dropped.
        timeout_s: Longest time to wait for a neighbour to connect.
        receive_by: How hidden states arrive.
        send_by: How they leave.
    """

    def __init__(
        self,
        stage: Executor,
        *,
        name: str,
        host: str,
        secret: bytes,
        epoch: int,
        timeout_s: float = 30.0,
        receive_by: ActivationPath | None = None,
        send_by: ActivationPath | None = None,
    ) -> None:
        self._stage = stage
        self._name = name
        self._secret = secret
        self._timeout_s = timeout_s
        self._receive_by = receive_by or InMessage()
        self._send_by = send_by or InMessage()
        self._order = StepOrder(epoch)
        self._listener = Listener(host, secret=secret)
        self._downstream: Connection | None = None
        self._arrived: SimpleQueue[_Arrival | None] = SimpleQueue()
        self._computed: SimpleQueue[Frame | LaunchedStep | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._connections: list[Connection] = []
        self._is_running = False
        self._is_closed = False
        self._fault: WireError | PipelineFaultError | None = None

    @property
    def address(self) -> Address:
        """Where the stage before, or the scheduler, is to connect."""
        return self._listener.address

    def connect(self, downstream: Address) -> None:
        """Connect to the next stage, or to the scheduler if this is the last.

        Raises:
            PipelineFaultError: It was not reached.
        """
        self._downstream = self._keep(connect(downstream, secret=self._secret, timeout_s=self._timeout_s))

    def run(self) -> None:
        """Compute steps until a neighbour closes its connection, or `close` is called.

        Raises:
            PipelineFaultError: Nobody connected, or hidden states got lost.
            WireError: A neighbour sent what is no message.
        """
        with self._lock:
            if self._is_closed:
                return
            self._is_running = True
        threads: list[threading.Thread] = []
        try:
            upstream = self._keep(self._listener.accept(self._timeout_s))
            threads.append(self._start(self._receive, upstream))
            if self._downstream is not None:
                threads.append(self._start(self._watch, self._downstream))
                sending = self._start(self._send, self._downstream)
                threads.append(sending)
            self._compute()
            self._computed.put(None)
            if self._downstream is not None:
                sending.join()  # what was computed is sent before the connection closes
            if self._fault is not None:
                raise self._fault
        except PipelineFaultError:
            if not self._is_closed:
                raise
        finally:
            self.close()
            self._computed.put(None)
            for thread in threads:
                thread.join()
            for connection in self._connections:
                connection.close()

    def close(self) -> None:
        """Part from the neighbours; `run` returns after the step that it is in. Any thread may call it."""
        with self._lock:
            if self._is_closed:
                return
            self._is_closed = True
            for connection in self._connections:
                if self._is_running:
                    connection.shut_down()  # its threads are in it
                else:
                    connection.close()
        self._listener.close()
        self._receive_by.close()
        self._send_by.close()
        self._arrived.put(None)

    def _keep(self, connection: Connection) -> Connection:
        with self._lock:
            if not self._is_closed:
                self._connections.append(connection)
                return connection
        connection.close()
        raise PipelineFaultError(f"{self._name} was closed", reason="died")

    def _start(self, target: Callable[[Connection], None], connection: Connection) -> threading.Thread:
        thread = threading.Thread(
            target=target, args=(connection,), name=f"{self._name} {target.__name__.strip('_')}", daemon=True
        )
        thread.start()
        return thread

    def _receive(self, upstream: Connection) -> None:
        """Take messages as they come, also while a step is computed: who sends never waits for that."""
        try:
            while (received := upstream.receive()) is not None:
                self._arrived.put(self._open_message(received, time.monotonic()))
            logger.info("%s: %s closed the connection", self._name, upstream.peer)
        except OSError as error:
            if not self._is_closed:
                logger.warning("%s: lost the connection from %s: %s", self._name, upstream.peer, error)
        except (WireError, PipelineFaultError) as error:
            logger.error("%s: closes the connection from %s: %s", self._name, upstream.peer, error)
            self._fault = error
        finally:
            self._arrived.put(None)

    def _open_message(self, received: Message, receive_s: float) -> _Arrival:
        if isinstance(received, StepInput):
            return StageMessage(step=received), None, receive_s
        if isinstance(received, StepOutput):
            raise WireError("a stage takes steps, got the output of one")
        return *unpack(received, self._receive_by), receive_s

    def _compute(self) -> None:
        while (arrival := self._arrived.get()) is not None and not self._is_closed:
            message, wait, receive_s = arrival
            if wait is not None:
                message = replace(message, hidden=wait())
            if self._order.is_old(message.step):
                logger.warning("%s: dropped step %d of an older epoch", self._name, message.step.step_id)
                continue
            problem = self._order.find_fault(message.step)
            if problem is not None and message.fault is None:
                logger.error("%s: %s", self._name, problem)
                fault = StepFault(message=f"{self._name}: {problem}", stage=self._stage.index, is_stage_broken=True)
                message = replace(message, hidden=None, fault=fault)
            output = self._stage.launch(message, receive_s)
            if self._downstream is None:  # a rank whose tokens another one has
                if isinstance(output, LaunchedStep):
                    output.wait()
            else:
                self._computed.put(output if isinstance(output, LaunchedStep) else self._make_frame(output))

    def _make_frame(self, output: StageMessage | StepOutput) -> Frame:
        if not isinstance(output, StepOutput):
            return encode(pack(output, self._send_by))
        try:
            return encode(output)
        except WireError as error:  # of logprobs beyond measure, say: the step's fault, not the stage's
            logger.error("%s: step %d cannot be sent: %s", self._name, output.step_id, error)
            fault = StepFault(message=f"{self._name}: {error}", stage=self._stage.index)
            token_ids = np.empty(0, dtype=np.int32)
            return encode(replace(output, token_ids=token_ids, logprobs={}, prompt_logprobs={}, errors={}, fault=fault))

    def _send(self, downstream: Connection) -> None:
        """Send what is computed, while the next step is."""
        try:
            while (computed := self._computed.get()) is not None:
                if isinstance(computed, LaunchedStep):
                    computed = self._make_frame(computed.wait())
                downstream.send(computed)
        except OSError as error:
            if not self._is_closed:
                logger.warning("%s: lost the connection to %s: %s", self._name, downstream.peer, error)
            self.close()

    def _watch(self, downstream: Connection) -> None:
        """Part from the stage before when the next one is gone, so that the scheduler hears of it from both ends."""
        downstream.wait_closed()
        self.close()
