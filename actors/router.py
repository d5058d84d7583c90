"""Route calls between deployments: a call that names its pipeline goes there, any other to the best by `routing`."""

import asyncio
import time

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, ReplicaID, RequestRouter, RunningReplica

from rayserve_sarathi.actors.messages import Submission
from rayserve_sarathi.routing import Call, PipelineChooser, PipelineReport, Prompt

_MAX_DEPARTED = 64
_RETRY_S = 0.1
_PROBE_S = 2.0


class PipelineRouter(RequestRouter):
    """Reads the keyword argument `pipeline` (a replica's unique id) of each call, and the prompts of a `submit`.

    Pipelines say what they have cached and what waits there in `SchedulerActor.record_routing_stats`, which Serve hands
    on with the list of replicas.

    Not a FIFO router: that one may hand a replica that was chosen for one call to another.
    """

    def initialize_state(self, **kwargs: object) -> None:
        """Serve calls this once, right after the constructor, which is its own."""
        self._chooser = PipelineChooser(clock=time.monotonic)
        self._departed: dict[str, RunningReplica] = {}

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Take the replicas that run. One that drains is not among them, but still hears calls that name it."""
        before = list(self.curr_replicas.values())
        super().update_replicas(replicas)
        self._chooser.update(
            {replica.replica_id.unique_id: PipelineReport(**replica.routing_stats) for replica in replicas}
        )
        for replica in before:
            if replica.replica_id not in self.curr_replicas:
                self._departed[replica.replica_id.unique_id] = replica
        while len(self._departed) > _MAX_DEPARTED:
            del self._departed[next(iter(self._departed))]

    def on_replica_actor_died(self, replica_id: ReplicaID) -> None:
        """Forget a replica."""
        super().on_replica_actor_died(replica_id)
        self._departed.pop(replica_id.unique_id, None)

    def on_replica_actor_unavailable(self, replica_id: ReplicaID) -> None:
        """Forget a replica that has drained, as it does not come back."""
        super().on_replica_actor_unavailable(replica_id)
        self._departed.pop(replica_id.unique_id, None)

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try, best first."""
        if pending_request is None:
            return [candidate_replicas]
        # Otherwise Serve asks again without ever yielding, and no other call of this process gets through.
        pending_request.routing_context.should_backoff = True
        running = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        # The caller's own object, which it goes on counting in.
        call = next((argument for argument in pending_request.args if isinstance(argument, Call)), None)
        best = self._chooser.choose(list(running), _prompts_of(pending_request), call=call)
        return [[running.pop(best)], list(running.values())]

    async def _choose_replica_for_request(
        self, pending_request: PendingRequest, *, is_retry: bool = False
    ) -> RunningReplica:
        """Return the replica that a call names; ask `choose_replicas` for any other call.

        Serve's own method, for which there is no public one: it waits while no replica runs, and counts what waits as a
        reason to start one. A call that names its pipeline is for that one or for none.
        """
        pipeline = pending_request.kwargs.get("pipeline")
        if pipeline is None:
            return await super()._choose_replica_for_request(pending_request, is_retry=is_retry)
        known = {replica.replica_id.unique_id: replica for replica in self.curr_replicas.values()}
        replica = known.get(pipeline) or self._departed.get(pipeline)
        if replica is None:
            raise RayServeException(f"pipeline {pipeline} is gone")
        if is_retry:  # it is ending, and has refused the call; or it is dead, which only its actor tells
            await asyncio.sleep(_RETRY_S)
            try:
                await asyncio.wait_for(replica.get_queue_len(deadline_s=_PROBE_S), _PROBE_S)
            except (RayError, TimeoutError) as error:
                raise RayServeException(f"pipeline {pipeline} is gone") from error
        return replica


def _prompts_of(call: PendingRequest) -> list[Prompt]:
    """Return the prompts that a call submits; no other call has any."""
    return [
        Prompt(num_tokens=len(submission.prompt_token_ids) + len(submission.output_token_ids), prefix=submission.prefix)
        for argument in call.args
        if isinstance(argument, list)
        for submission in argument
        if isinstance(submission, Submission)
    ]
