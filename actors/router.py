"""Route calls between deployments: a call that names its pipeline goes there, any other to the shorter queue of two."""

import random

from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica


class PipelineRouter(RequestRouter):
    """Reads the keyword argument `pipeline` (a replica's unique id) of each call.

    Not a FIFO router: that one may hand a replica that was chosen for one call to another.
    """

    async def choose_replicas(
        self,
        candidate_replicas: list[RunningReplica],
        pending_request: PendingRequest | None = None,
    ) -> list[list[RunningReplica]]:
        """Return the replicas to try. A call for a pipeline that is gone, or drains, fails at once."""
        chosen = random.sample(candidate_replicas, min(2, len(candidate_replicas)))
        if pending_request is None:
            return [chosen]
        # Otherwise Serve asks again without ever yielding, and no other call of this process gets through.
        pending_request.routing_context.should_backoff = True
        pipeline = pending_request.kwargs.get("pipeline")
        if pipeline is None:
            return [chosen]
        named = [replica for replica in candidate_replicas if replica.replica_id.unique_id == pipeline]
        if not named and not pending_request.future.done():
            pending_request.future.set_exception(RayServeException(f"pipeline {pipeline} is gone"))
        return [named or candidate_replicas]  # Serve drops a request whose future is done
