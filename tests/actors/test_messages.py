import pickle

from ray import cloudpickle

from rayserve_sarathi.actors.messages import OutputBatch
from rayserve_sarathi.request import FinishReason, RequestOutput, TokenLogprobs


def test_a_batch_of_outputs_comes_back_from_ray_as_it_was():
    logprobs = (TokenLogprobs(7, -0.5, (7, 3), (-0.5, -1.0)),)
    batch = OutputBatch(
        outputs=[
            RequestOutput("a", (7,), logprobs=logprobs, prompt_logprobs=logprobs * 2, num_cached_tokens=16),
            RequestOutput("b", (1, 2), FinishReason.STOP),
            RequestOutput("c", finish_reason=FinishReason.LOST, error="gone"),
        ],
        num_waiting=3,
    )

    received = pickle.loads(cloudpickle.dumps(batch))

    assert received == batch
    assert [type(output) for output in received.outputs] == [RequestOutput] * 3
    assert type(received.outputs[0].logprobs[0]) is TokenLogprobs
    assert received.outputs[1].finish_reason is FinishReason.STOP
