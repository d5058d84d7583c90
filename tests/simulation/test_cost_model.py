"""The sum over operators, layers and stages, by data sheet."""

import math

import pytest

from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.step_shape import StepShape, StepTimeModel


def decodes(num_decodes: int, context_len: int) -> StepShape:
    return StepShape(
        num_decodes=num_decodes,
        decode_context_tokens=num_decodes * context_len,
        chunks=(),
        num_samples=num_decodes,
    )


def chunks(*sizes: tuple[int, int], num_samples: int = 0) -> StepShape:
    return StepShape(num_decodes=0, decode_context_tokens=0, chunks=sizes, num_samples=num_samples)


def stage_s(model: StepTimeModel, shape: StepShape) -> float:
    return sum(model.stage_times_s(shape))


def yi(*, tp: int = 2, pp: int = 1) -> CostModel:
    return make_step_time_model("yi-34b", "a100", tensor_parallel_size=tp, pipeline_parallel_size=pp)


def test_more_tokens_context_or_decodes_never_take_less_time():
    model = yi()
    for grow in (
        [chunks((size, 1000)) for size in range(2, 1200, 7)],
        [chunks((512, context)) for context in range(0, 9000, 111)],
        [decodes(number, 2000) for number in range(1, 400, 3)],
        [decodes(32, context) for context in range(0, 9000, 111)],
    ):
        times = [stage_s(model, shape) for shape in grow]
        assert times == sorted(times)
        assert times[-1] > times[0]


def test_linear_layers_are_flat_up_to_the_knee_and_in_proportion_beyond():
    model = yi()

    def linear_s(num_tokens: int) -> float:
        parts = model.parts_s(chunks((num_tokens, 0)))
        return sum(parts[operator] for operator in ("qkv", "o", "up", "down"))

    assert linear_s(128) < 1.1 * linear_s(2)
    assert linear_s(4096) == pytest.approx(2 * linear_s(2048), rel=0.01)


def test_a_token_more_than_whole_tiles_costs_a_tile():
    model = yi()
    times = {size: stage_s(model, chunks((size, 0))) for size in (256, 257, 384, 512, 513)}

    assert 1.2 < times[257] / times[256] < 1.5
    assert times[384] < 1.05 * times[257]
    assert times[513] - times[512] > 0.15 * times[512]


def test_parts_add_up_to_the_latency():
    model = make_step_time_model("falcon-180b", "a100", tensor_parallel_size=4, pipeline_parallel_size=2)
    shape = StepShape(num_decodes=20, decode_context_tokens=30000, chunks=((400, 1000), (92, 0)), num_samples=21)

    assert sum(model.parts_s(shape).values()) == pytest.approx(model.latency_s(shape))
    assert model.latency_s(shape) == pytest.approx(
        model.cpu_s(shape) + sum(model.stage_times_s(shape)) + model.transfer_s(shape)
    )


def test_a_chunk_beside_decodes_costs_less_than_both_apart_and_more_than_either():
    model = yi()
    chunk, decode = chunks((480, 1024)), decodes(32, 1024)
    both = StepShape(num_decodes=32, decode_context_tokens=32 * 1024, chunks=((480, 1024),), num_samples=32)

    assert max(stage_s(model, chunk), stage_s(model, decode)) < stage_s(model, both)
    assert stage_s(model, both) < stage_s(model, chunk) + stage_s(model, decode)


def test_attention_of_several_chunks_is_the_sum_of_theirs():
    model = yi()
    both = model.parts_s(chunks((256, 1024), (128, 0)))["chunk_attention"]
    apart = [model.parts_s(chunks(chunk))["chunk_attention"] for chunk in ((256, 1024), (128, 0))]

    assert both == pytest.approx(sum(apart))


def test_ranks_share_the_work_and_pay_for_all_reduces():
    shape = chunks((512, 0))
    one, two = yi(tp=1).parts_s(shape), yi(tp=2).parts_s(shape)

    for operator in ("qkv", "o", "up", "down", "chunk_attention"):
        assert two[operator] == pytest.approx(one[operator] / 2, rel=0.1), "but for launches"
    assert two["norm"] == one["norm"], "every rank has all of the hidden states"
    assert one["all_reduce"] == 0 < two["all_reduce"]
    # More than the pair that NVLink connects.
    assert yi(tp=4).parts_s(shape)["all_reduce"] > 2 * two["all_reduce"]


def test_stages_share_the_layers_and_the_last_one_samples():
    shape = StepShape(num_decodes=32, decode_context_tokens=32 * 4096, chunks=((480, 0),), num_samples=33)
    whole, halves = yi(pp=1), yi(pp=2)
    first_s, last_s = halves.stage_times_s(shape)

    assert (whole.num_stages, halves.num_stages) == (1, 2)
    assert first_s + last_s == pytest.approx(stage_s(whole, shape))
    assert last_s - first_s == pytest.approx(
        halves.parts_s(shape)["head_and_sampler"] - halves.parts_s(shape)["embedding"]
    )
    assert whole.transfer_s(shape) == 0 < halves.transfer_s(shape)


def test_stages_on_other_nodes_take_longer_to_reach():
    shape = chunks((512, 0))
    near = make_step_time_model("falcon-180b", "a100-dgx", tensor_parallel_size=4, pipeline_parallel_size=2)
    far = make_step_time_model("falcon-180b", "a100", tensor_parallel_size=4, pipeline_parallel_size=2)

    assert far.transfer_s(shape) > 2 * near.transfer_s(shape)


def test_attention_beside_the_mlp_has_one_all_reduce():
    shape = chunks((512, 0))
    falcon = make_step_time_model("falcon-180b", "a100", tensor_parallel_size=2).parts_s(shape)["all_reduce"] / 80
    llama = make_step_time_model("llama2-70b", "a100", tensor_parallel_size=2).parts_s(shape)["all_reduce"] / 80

    assert falcon < 1.5 * llama, "though its hidden states are nearly twice as large"


def test_a_window_bounds_what_attention_reads():
    mistral = make_step_time_model("mistral-7b", "a100")

    assert stage_s(mistral, decodes(32, 8192)) == stage_s(mistral, decodes(32, 4096))
    assert stage_s(mistral, decodes(32, 4096)) > stage_s(mistral, decodes(32, 2048))
    assert stage_s(mistral, chunks((512, 8192))) == stage_s(mistral, chunks((512, 4096)))


def test_a_long_prompt_has_the_pairs_of_its_window_alone():
    mistral = make_step_time_model("mistral-7b", "a100")
    llama = make_step_time_model("llama3-8b", "a100")

    def attention_s(model: CostModel, query_len: int, context_len: int) -> float:
        return model.parts_s(chunks((query_len, context_len)))["chunk_attention"]

    assert attention_s(mistral, 4096, 0) == attention_s(llama, 4096, 0)
    # Half of the first 4096 tokens' square, and all of each of those that follow.
    assert attention_s(mistral, 16384, 0) / attention_s(mistral, 4096, 0) == pytest.approx(
        0.5 / 0.5 + 3 / 0.5, rel=0.01
    )
    assert attention_s(mistral, 512, 4000) < attention_s(llama, 512, 4000)


def test_only_samples_pay_for_the_head():
    model = yi()
    without, with_one = chunks((512, 0)), chunks((512, 0), num_samples=1)

    assert model.parts_s(without)["head_and_sampler"] == 0
    head_bytes = 7168 * 64000 // 2 * 2
    assert stage_s(model, with_one) - stage_s(model, without) == pytest.approx(head_bytes / (2039e9 * 0.75), rel=0.02)


def test_an_empty_prompt_of_decodes_reads_all_weights_once():
    # 2 bytes of each of 16.8 billion weights of a rank, at three quarters of 2039 GB/s.
    parts = yi().parts_s(decodes(1, 1))
    linear_s = sum(parts[operator] for operator in ("qkv", "o", "up", "down"))

    assert linear_s == pytest.approx(33.47e9 / (2039e9 * 0.75), rel=0.05)


def test_faster_hardware_is_faster():
    shape = StepShape(num_decodes=32, decode_context_tokens=32 * 1024, chunks=((480, 0),), num_samples=32)
    times = [stage_s(make_step_time_model("mistral-7b", name), shape) for name in ("cpu", "a40", "a100", "h100")]

    assert times == sorted(times, reverse=True)
    decode = decodes(64, 4096)
    h100, h200 = (make_step_time_model("mistral-7b", name) for name in ("h100", "h200"))
    assert stage_s(h200, decode) / stage_s(h100, decode) == pytest.approx(3.35 / 4.8, rel=0.05)


def test_times_are_finite_for_any_step():
    model = yi()
    for shape in (decodes(1, 0), decodes(1000, 100_000), chunks((2, 0)), chunks((100_000, 100_000))):
        assert all(math.isfinite(seconds) and seconds > 0 for seconds in model.stage_times_s(shape))
