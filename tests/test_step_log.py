"""What the engine notes of steps."""

from rayserve_sarathi.step import StepInput, StepOutput
from rayserve_sarathi.step_log import StepLog
from tests.factories import HashModel, make_request, make_scheduler
from tests.timelines import timeline

TIMINGS = timeline([[0.01, 0.02]], max_in_flight=1)[0].timings


def make_steps(num_requests: int, *, num_steps: int = 1) -> list[tuple[StepInput, StepOutput]]:
    """Return steps of requests, the newest of which is in prefill, and what came of them."""
    scheduler = make_scheduler(num_blocks=512, token_budget=num_requests + 8, max_num_seqs=num_requests)
    model = HashModel(num_blocks=512, block_size=4)
    for index in range(num_requests - 1):
        scheduler.add(make_request(f"decode-{index}", prompt=1, max_tokens=50))
    steps = []
    while len(steps) < num_steps + 2:
        if len(steps) == 2:
            scheduler.add(make_request("prefill", prompt=100, max_tokens=50))
        step = scheduler.schedule(0.0)
        assert step is not None
        output = model.run(step)
        scheduler.update(output, 0.0)
        steps.append((step, StepOutput(step_id=step.step_id, epoch=0, token_ids=output.token_ids, timings=TIMINGS)))
    return steps[2:]


def test_a_record_tells_what_was_in_the_step_and_when_it_was_where():
    log = StepLog()
    ((step, output),) = make_steps(3)
    log.note_submit(step, 1.0)
    log.note_return(output, 2.0)
    trace = log.trace(pipeline="a", now_s=3.0)

    (record,) = trace.records
    assert (trace.pipeline, trace.now_s) == ("a", 3.0)
    assert (record.step_id, record.epoch) == (step.step_id, 0)
    assert (record.num_decodes, record.num_prefill_tokens) == (2, 9)
    assert record.request_ids == ("decode-0", "decode-1", "prefill")
    assert (record.submit_s, record.back_s) == (1.0, 2.0)
    assert record.stages == ((0.0, 0.0, 0.01), (0.01, 0.01, 0.03))
    assert [stage.busy_s for stage in log.stage_times.totals()] == [0.01, 0.03 - 0.01]


def test_of_many_requests_those_in_prefill_are_named():
    log = StepLog()
    ((step, output),) = make_steps(100)
    log.note_submit(step, 1.0)
    log.note_return(output, 2.0)

    (record,) = log.trace(pipeline="a", now_s=3.0).records
    assert (len(record.request_ids), record.request_ids[-1]) == (16, "prefill")
    assert (record.num_decodes, record.num_prefill_tokens) == (99, 9)


def test_only_the_last_steps_are_kept():
    log = StepLog(max_records=3)
    steps = make_steps(2, num_steps=5)
    for step, output in steps:
        log.note_submit(step, 1.0)
        log.note_return(output, 2.0)

    records = log.trace(pipeline="a", now_s=3.0).records
    assert [record.step_id for record in records] == [step.step_id for step, _ in steps[2:]]


def test_steps_that_a_rebuilt_pipeline_has_lost_are_forgotten():
    log = StepLog()
    (lost, _), (step, output) = make_steps(2, num_steps=2)
    log.note_submit(lost, 1.0)
    log.restart()
    log.note_submit(step, 5.0)
    log.note_return(output, 6.0)

    (record,) = log.trace(pipeline="a", now_s=7.0).records
    assert (record.step_id, record.submit_s) == (step.step_id, 5.0)
    (stage, _) = log.stage_times.totals()
    assert stage.busy_s == 0.01
