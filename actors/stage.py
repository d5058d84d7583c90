"""The actor of one rank of a pipeline stage: receive, compute, send."""

import logging
import os
import pickle
import threading
from typing import TYPE_CHECKING

import ray

from rayserve_sarathi.actors.logs import log_to_stderr
from rayserve_sarathi.config import EngineConfig
from rayserve_sarathi.registry import import_object
from rayserve_sarathi.step import StepOutput

if TYPE_CHECKING:
    from torch.distributed import TCPStore  # type: ignore[attr-defined]  # not in torch's __all__

    from rayserve_sarathi.execution.activations import ActivationPath
    from rayserve_sarathi.execution.socket_stage import SocketStage
    from rayserve_sarathi.execution.sockets import Address
    from rayserve_sarathi.execution.stage import Stage, StageMessage

logger = logging.getLogger(__name__)

_FAREWELL_S = 1.0
"""So long a rank that has left the others still answers: a fault that gets through fails its requests, where otherwise
they would be tried again."""


class StageActor:
    """A `Stage` in a process of its own.

    Torch is loaded here and not with this module, which the scheduler's process imports to start stages.

    `load` is a call of its own, as an error in a constructor would reach the caller as text only.

    Args:
        config: The engine's, with a `device` that is not `auto`.
        stage: Which stage, from 0.
        tp_rank: Which of its tensor-parallel ranks, from 0.
        num_threads: Threads for the CPU's share of the work.
    """

    def __init__(self, config: EngineConfig, *, stage: int, tp_rank: int, num_threads: int) -> None:
        log_to_stderr()
        import_object("torch:set_num_threads")(num_threads)
        self._config = config
        self._index = stage
        self._tp_rank = tp_rank
        self._stage: Stage | None = None
        self._socket_stage: SocketStage | None = None
        self._meetings: dict[Address, TCPStore] = {}
        """Those that were opened here and nobody has gone to yet."""

    def open_meeting(self) -> "Address":
        """Begin to listen where the ranks of this stage, or the two ends of a link, find each other; return where."""
        host: str = ray.util.get_node_ip_address()  # type: ignore[no-untyped-call]  # Ray's annotation is missing
        store: TCPStore = import_object("rayserve_sarathi.models.process_group:open_store")(
            host, timeout_s=self._config.placement_timeout_s
        )
        meeting = (host, store.port)
        self._meetings[meeting] = store
        return meeting

    def load(self, meeting: "Address") -> int:
        """Meet the other ranks, load the weights; return how many KV blocks there is room for.

        Raises:
            ConfigError: The weights are not to be had, or leave no room.
            EngineDeadError: The other ranks did not come.
        """
        tp = import_object("rayserve_sarathi.models.parallel:join")(
            self._go_to(meeting),
            tp_rank=self._tp_rank,
            tp_size=self._config.tensor_parallel_size,
            meeting_timeout_s=self._config.placement_timeout_s,
            timeout_s=self._config.step_timeout_s,
            device=import_object("rayserve_sarathi.models.load:resolve_device")(self._config),
        )
        stage: Stage = import_object("rayserve_sarathi.execution.stage:Stage")(
            self._config, index=self._index, tp=tp, on_leave=self._end_soon if self._config.device == "cuda" else None
        )
        self._stage = stage
        stage.load()
        return stage.fit()

    def start(self, num_blocks: int) -> None:
        """Allocate the KV cache."""
        self._loaded.start(num_blocks)

    def execute_first(self, step: bytes) -> "StageMessage | bytes":
        """Compute the first stage's part of a step, for the transport by compiled graphs.

        Args:
            step: A `StepInput`, pickled, which takes less of the time between two steps than Ray's own pickler.

        Returns:
            The message to the next stage, or the `StepOutput` of the last one, pickled: as an object its arrays would
            be views of the graph's buffer, which cannot be written to before they are gone, and they must not outlive.
        """
        return _own_memory(self._loaded.execute_first(pickle.loads(step)))

    def execute(self, message: "StageMessage") -> "StageMessage | bytes":
        """Compute this stage's part of a step; see `execute_first`."""
        return _own_memory(self._loaded.execute(message))

    def listen(
        self, secret: bytes, epoch: int, *, receive_at: "Address | None", send_at: "Address | None"
    ) -> "Address":
        """Begin to listen for the stage before, for the transport by sockets; return where.

        Args:
            secret: Known to the processes of this pipeline alone.
            epoch: Steps of an older one are dropped.
            receive_at: Where the two ends of the link to the stage before meet; None for activations within messages.
            send_at: The same for the stage after.
        """
        self._socket_stage = import_object("rayserve_sarathi.execution.socket_stage:SocketStage")(
            self._loaded,
            name=f"stage {self._index}, rank {self._tp_rank}",
            host=ray.util.get_node_ip_address(),  # type: ignore[no-untyped-call]  # Ray's annotation is missing
            secret=secret,
            epoch=epoch,
            receive_by=self._open_path(receive_at, is_sender=False),
            send_by=self._open_path(send_at, is_sender=True),
        )
        return self._joined.address

    def connect(self, address: "Address") -> None:
        """Connect to the stage behind, or to the scheduler; after `listen`."""
        self._joined.connect(address)

    def run_sockets(self) -> None:
        """Compute what comes until a neighbour is gone or `part` is called; after `connect`."""
        self._joined.run()

    def part(self) -> None:
        """Close all connections, and the meetings that came to nothing."""
        self._meetings.clear()
        if self._socket_stage is not None:
            self._socket_stage.close()

    def pid(self) -> int:
        """Return the id of its process: a sign of life, and what an operator looks for."""
        return os.getpid()

    def _end_soon(self) -> None:
        """End this process after a while: over NCCL it is all that shows that this rank has left the others."""
        logger.critical("stage %d, rank %d ends, as it has left the other ranks", self._index, self._tp_rank)
        ending = threading.Timer(_FAREWELL_S, os._exit, (1,))
        ending.daemon = True
        ending.start()

    def _open_path(self, meeting: "Address | None", *, is_sender: bool) -> "ActivationPath | None":
        if meeting is None:
            return None
        path: ActivationPath = import_object("rayserve_sarathi.execution.activations:open_group")(
            self._go_to(meeting),
            is_sender=is_sender,
            meeting_timeout_s=self._config.placement_timeout_s,
            timeout_s=self._config.step_timeout_s,
            device=import_object("rayserve_sarathi.models.load:resolve_device")(self._config),
        )
        return path

    def _go_to(self, meeting: "Address") -> "TCPStore":
        """Return the store of a meeting: the one that was opened here, or the way to another's."""
        if meeting in self._meetings:
            return self._meetings.pop(meeting)
        store: TCPStore = import_object("rayserve_sarathi.models.process_group:find_store")(
            *meeting, timeout_s=self._config.placement_timeout_s
        )
        return store

    @property
    def _joined(self) -> "SocketStage":
        assert self._socket_stage is not None, "listen comes first"
        return self._socket_stage

    @property
    def _loaded(self) -> "Stage":
        assert self._stage is not None, "load comes first"
        return self._stage


def _own_memory(message: "StageMessage | StepOutput") -> "StageMessage | bytes":
    return pickle.dumps(message, pickle.HIGHEST_PROTOCOL) if isinstance(message, StepOutput) else message
