"""What a request counts in the call that it travels with, as routers see it."""

from array import array

from rayserve_sarathi.actors.open_request import OpenRequest
from rayserve_sarathi.errors import EngineDeadError
from rayserve_sarathi.kv.prefix_marks import PrefixMarks
from rayserve_sarathi.request import FinishReason, RequestOutput, SamplingParams
from rayserve_sarathi.routing import Call


def sent(request_id: str, call: Call) -> OpenRequest:
    request = OpenRequest(request_id, array("i", [1]), SamplingParams(), cache_salt="", prefix=PrefixMarks())
    request.begin_attempt()
    request.join(call)
    return request


def counts(call: Call) -> tuple[int, int]:
    return call.num_waiting, call.num_open


def test_a_request_waits_until_its_first_output_and_is_open_until_its_last():
    call = Call("ingress", 1)
    first, second = sent("a", call), sent("b", call)
    assert counts(call) == (2, 2)
    first.put(RequestOutput("a", (5,)))
    first.put(RequestOutput("a", (6,)))
    assert counts(call) == (1, 2)
    second.put(RequestOutput("b", (5,), FinishReason.STOP))
    assert counts(call) == (0, 1)
    first.put(RequestOutput("a", (7,), FinishReason.LENGTH))
    first.leave_call()  # its client has read that

    assert counts(call) == (0, 0)


def test_a_request_that_fails_or_is_closed_counts_no_longer():
    call = Call("ingress", 1)
    sent("a", call).fail(EngineDeadError("gone"))
    sent("b", call).leave_call()

    assert counts(call) == (0, 0)


def test_a_request_that_is_sent_again_counts_in_its_new_call_alone():
    first, second = (Call("ingress", number) for number in (1, 2))
    request = sent("a", first)
    request.put(RequestOutput("a", (5,)))
    request.begin_attempt()
    request.join(second)
    assert (counts(first), counts(second)) == ((0, 0), (1, 1))
    request.put(RequestOutput("a", (6,)))

    assert counts(second) == (0, 1)
