"""Route calls between deployments: a call that names its pipeline goes there, any other to the shorter queue of two."""

import random

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
        """Return the replicas to try; none yet makes Serve ask again."""
        pipeline = None if pending_request is None else pending_request.kwargs.get("pipeline")
        if pipeline is not None:
            return [[replica for replica in candidate_replicas if replica.replica_id.unique_id == pipeline]]
        return [random.sample(candidate_replicas, min(2, len(candidate_replicas)))]
