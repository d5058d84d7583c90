"""The router between ingresses and pipelines, without a cluster."""

from array import array
from dataclasses import dataclass, field
from typing import Any

import pytest
from ray.serve._private.common import DeploymentHandleSource, DeploymentID, ReplicaID, RequestMetadata
from ray.serve.exceptions import RayServeException
from ray.serve.request_router import PendingRequest

from rayserve_sarathi.actors.messages import Submission
from rayserve_sarathi.actors.router import PipelineRouter
from rayserve_sarathi.kv.prefix_marks import marks_of_prompt
from rayserve_sarathi.request import SamplingParams
from rayserve_sarathi.routing import Call

DEPLOYMENT = DeploymentID(name="SchedulerActor", app_name="test")
PROMPTS = [array("i", [index] * 100) for index in range(4)]


@dataclass(frozen=True)
class Replica:
    """What a router sees of a replica."""

    name: str
    routing_stats: dict[str, Any] = field(default_factory=dict)
    max_ongoing_requests: int = 10

    @property
    def replica_id(self) -> ReplicaID:
        return ReplicaID(self.name, deployment_id=DEPLOYMENT)

    async def get_queue_len(self, *, deadline_s: float) -> int:
        return 0


def submission(prompt: "array[int]") -> Submission:
    prefix = marks_of_prompt(prompt, block_size=8, cache_salt="")
    return Submission(request_id="id", prompt_token_ids=prompt, sampling=SamplingParams(), prefix=prefix)


def call(*args: object, **kwargs: object) -> PendingRequest:
    return PendingRequest(
        args=list(args), kwargs=kwargs, metadata=RequestMetadata(request_id="id", internal_request_id="id")
    )


def submit(number: int, prompt: "array[int]") -> PendingRequest:
    return call(Call("ingress", number, num_waiting=1, num_open=1), [submission(prompt)])


async def chosen(router: PipelineRouter, pending: PendingRequest) -> str:
    """Return which replica a call goes to, by the method that Serve calls."""
    replica = await router._choose_replica_for_request(pending)
    return str(replica.replica_id.unique_id)


@pytest.fixture
async def router() -> PipelineRouter:
    made = PipelineRouter(deployment_id=DEPLOYMENT, handle_source=DeploymentHandleSource.REPLICA)
    made.initialize_state()
    made.update_replicas([Replica("a"), Replica("b")])
    return made


async def test_submissions_follow_what_pipelines_say_of_themselves(router: PipelineRouter):
    packed = [b"".join(submission(prompt).prefix.marks) for prompt in PROMPTS]
    router.update_replicas([Replica("a", {"marks": packed[0]}), Replica("b", {"marks": packed[1]})])

    assert await chosen(router, submit(1, PROMPTS[1])) == "b"
    assert await chosen(router, submit(1, PROMPTS[0])) == "a"


async def test_what_was_sent_counts_until_its_pipeline_reports_that_call(router: PipelineRouter):
    router.update_replicas([Replica("a"), Replica("b", {"num_open_requests": 2})])
    assert await chosen(router, submit(1, PROMPTS[0])) == "a"
    assert await chosen(router, submit(2, PROMPTS[1])) == "b"
    router.update_replicas([Replica("a", {"last_calls": {"ingress": 1}}), Replica("b", {"num_open_requests": 2})])

    assert await chosen(router, submit(3, PROMPTS[2])) == "a"


async def test_a_call_that_names_its_pipeline_goes_there(router: PipelineRouter):
    assert [await chosen(router, call(pipeline=name)) for name in "abba"] == list("abba")


async def test_a_pipeline_that_drains_hears_its_name_and_gets_nothing_else(router: PipelineRouter):
    router.update_replicas([Replica("b")])

    assert await chosen(router, call(pipeline="a")) == "a"
    assert {await chosen(router, submit(1, prompt)) for prompt in PROMPTS} == {"b"}


async def test_the_last_pipeline_hears_its_name_while_it_drains(router: PipelineRouter):
    router.update_replicas([])

    assert await chosen(router, call(pipeline="a")) == "a"


@pytest.mark.parametrize("left", [["b"], []], ids=["one-is-left", "none-is-left"])
async def test_a_call_for_a_pipeline_that_is_gone_fails_at_once(router: PipelineRouter, left: list[str]):
    router.update_replicas([Replica(name) for name in left])
    router.on_replica_actor_unavailable(Replica("a").replica_id)

    with pytest.raises(RayServeException, match="pipeline a is gone"):
        await chosen(router, call(pipeline="a"))


async def test_if_the_best_pipeline_does_not_answer_another_is_tried(router: PipelineRouter):
    ranks = await router.choose_replicas(list(router.curr_replicas.values()), submit(1, PROMPTS[0]))

    assert sorted(replica.name for rank in ranks for replica in rank) == ["a", "b"]
