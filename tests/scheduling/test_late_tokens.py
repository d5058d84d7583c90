"""Why tokens come late: each cause made on purpose, and found."""

from typing import Any

import numpy as np
import pytest

from rayserve_sarathi.config import SloConfig
from rayserve_sarathi.metrics import Snapshot, render
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.scheduling.late_tokens import LateGap
from rayserve_sarathi.step import StepInput, StepOutput
from rayserve_sarathi.step_shape import shape_of
from tests.factories import make_request, make_scheduler
from tests.scheduling.true_times import ImaginedDevice, WrongModel


class Rig:
    """A scheduler with a target of 0.1 s, and a clock that moves as a test says."""

    def __init__(self, policy: str = "sarathi", **options: Any) -> None:
        options = {"num_blocks": 4000, "block_size": 16, "max_model_len": 20_000, "token_budget": 512} | options
        options |= {"enable_prefix_caching": False, "prior": WrongModel(1.0), "watermark": 0.0}
        self.scheduler: Scheduler = make_scheduler(policy, slo=SloConfig(tbt_s=0.1), **options)
        self.now_s = 0.0
        self.device = ImaginedDevice()

    def add(self, request_id: str, prompt: int, max_tokens: int = 200) -> None:
        self.scheduler.add(make_request(request_id, prompt=prompt, max_tokens=max_tokens, arrival_s=self.now_s))

    def step(self, *, extra_s: float = 0.0) -> StepInput:
        """Run a step that takes `extra_s` longer than the device needs."""
        step = self.scheduler.schedule(self.now_s)
        assert step is not None
        self.now_s += self.device(shape_of(step))[0] + extra_s
        token_ids = np.zeros(len(step.sample_requests), dtype=np.int32)
        self.scheduler.update(StepOutput(step_id=step.step_id, epoch=step.epoch, token_ids=token_ids), self.now_s)
        return step

    def steps(self, num_steps: int) -> None:
        for _ in range(num_steps):
            self.step()

    @property
    def causes(self) -> dict[str, int]:
        return dict(self.scheduler.metrics.num_tbt_slo_violations)


def test_tokens_in_time_have_no_report():
    rig = Rig()
    rig.add("a", 100)
    rig.steps(50)

    assert rig.causes == {}
    assert rig.scheduler.late_reports("a") == []


def test_what_others_found_late_is_counted_and_reported_after_the_end_too():
    rig = Rig()
    rig.add("a", 100, max_tokens=5)
    rig.steps(5)
    rig.scheduler.note_late("a", LateGap(3, 0.4, "slow_reader", None))

    (report,) = rig.scheduler.late_reports("a")
    assert (report.num_late, report.gaps) == ({"slow_reader": 1}, (LateGap(3, 0.4, "slow_reader", None),))
    assert rig.causes == {"slow_reader": 1}


def test_nothing_is_late_without_a_target():
    scheduler = make_scheduler("sarathi")
    scheduler.note_late("a", LateGap(3, 0.4, "slow_reader", None))

    assert scheduler.tbt_s is None
    assert scheduler.late_reports("a") == []
    assert not scheduler.metrics.num_tbt_slo_violations


@pytest.mark.parametrize("policy", ["sarathi", "vllm"])
def test_a_prompt_that_stalls_decodes_is_named(policy: str):
    # In the step of the token, or in one of its own since the last token.
    rig = Rig(policy, token_budget=8192)
    rig.add("a", 100)
    rig.steps(20)
    rig.add("long", 6000)
    rig.steps(10)

    assert rig.causes == {"prefill": 1}
    (report,) = rig.scheduler.late_reports("a")
    (gap,) = report.gaps
    assert (gap.cause, gap.culprit, gap.position) == ("prefill", "long", 20)
    assert gap.gap_s > 0.3


def test_a_step_that_takes_longer_than_its_content_explains_is_slow():
    rig = Rig()
    rig.add("a", 100)
    rig.steps(30)
    rig.step(extra_s=0.5)

    assert rig.causes == {"slow_stage": 1}


def test_a_scheduler_that_is_late_itself_makes_a_bubble():
    rig = Rig()
    rig.add("a", 100)
    rig.steps(30)
    rig.now_s += 0.5
    rig.step()

    assert rig.causes == {"bubble": 1}


def test_too_many_decodes_are_their_own_cause():
    rig = Rig(max_num_seqs=8, num_blocks=8 * 1250, max_model_len=20_000, token_budget=8192)
    for index in range(8):
        rig.add(f"long-{index}", 19_000)
    rig.steps(25)  # all prompts are computed
    rig.device = ImaginedDevice(slowness=8.0)
    rig.steps(60)  # the first ones are slow, until that is what is expected
    rig.scheduler.metrics.num_tbt_slo_violations.clear()
    rig.steps(20)

    assert rig.causes == {"decodes": 20 * 8}


def test_a_preempted_request_waits_for_blocks():
    rig = Rig(num_blocks=40, max_model_len=600)
    rig.add("old", 300, max_tokens=260)
    rig.add("new", 300, max_tokens=100)
    rig.steps(300)

    assert rig.scheduler.metrics.num_preemptions == 1
    assert rig.causes == {"kv_wait": 1}
    (report,) = rig.scheduler.late_reports("new")
    assert report.num_late == {"kv_wait": 1}


def test_a_rebuilt_pipeline_is_the_cause_of_what_it_delays():
    rig = Rig()
    rig.add("a", 100)
    rig.steps(30)
    rig.scheduler.restart()
    rig.now_s += 2.0
    rig.steps(3)

    assert rig.causes == {"rebuild": 1}


def test_a_request_keeps_a_bounded_number_of_gaps_and_all_counts():
    rig = Rig(token_budget=4096)
    rig.add("a", 100, max_tokens=190)
    rig.steps(20)
    for index in range(30):
        rig.add(f"prompt-{index}", 4000, max_tokens=1)
        rig.steps(2)

    (report,) = rig.scheduler.late_reports("a")
    assert len(report.gaps) < report.num_late["prefill"] == rig.causes["prefill"]


def test_the_metrics_have_the_causes_and_the_errors_of_predictions():
    rig = Rig(token_budget="auto")
    rig.add("a", 100)
    rig.steps(30)
    rig.step(extra_s=0.5)

    snapshot = Snapshot(
        model_name="m", pipeline="p", metrics=rig.scheduler.metrics, state=rig.scheduler.state(), stages=()
    )
    text = render([snapshot])
    assert 'sarathi_tbt_slo_violations_total{cause="slow_stage",model_name="m",pipeline="p"} 1.0' in text
    assert 'sarathi_step_time_prediction_error_ratio_count{model_name="m",pipeline="p"} 31.0' in text
    budget = float(text.split('sarathi_token_budget{model_name="m",pipeline="p"} ')[1].split("\n")[0])
    assert 1 <= budget <= 8192
