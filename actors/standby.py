"""An application without pipelines that is fine: it has scaled to zero, and the next request starts one."""

import asyncio

from ray import serve
from ray.serve.schema import DeploymentStatusOverview

# As strings, since Serve keeps the enumerations private.
_FINE = {"HEALTHY", "UPSCALING", "DOWNSCALING"}
_LIVING = {"RUNNING", "UPDATING", "RECOVERING"}


async def stands_by(app_name: str, deployment_name: str) -> bool:
    """Return whether a deployment that nobody answers for is meant to be at zero, or on its way up from there."""
    status = await asyncio.to_thread(serve.status)
    deployments = status.applications[app_name].deployments
    return deployment_name in deployments and _is_at_zero(deployments[deployment_name])


def _is_at_zero(deployment: DeploymentStatusOverview) -> bool:
    return deployment.status in _FINE and _LIVING.isdisjoint(deployment.replica_states)
