"""Which splits of a model there are, and which fit; the figures are worked out by hand."""

from dataclasses import replace

import pytest

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.fit import Fit, Parallelism, check_fit, parallelisms
from rayserve_sarathi.simulation.hardware import find_hardware
from rayserve_sarathi.simulation.model_shape import find_model

# Mistral 7B: 32 layers of 218,103,808 weights and two tables of 32,000 x 4,096; 2 MiB of KV for 16 tokens.
MISTRAL_BYTES = 2 * (32 * 218_103_808 + 2 * 32_000 * 4_096)
MISTRAL_BLOCK_BYTES = 2 * 32 * 1_024 * 2 * 16
# Yi 34B: 60 layers of 557,842,432 weights and two tables of 64,000 x 7,168.
YI_LAYER, YI_TABLE = 557_842_432, 64_000 * 7_168


def split(num_ranks: int, num_stages: int) -> Parallelism:
    return Parallelism(tensor_parallel_size=num_ranks, pipeline_parallel_size=num_stages)


def test_ranks_are_powers_of_two_up_to_a_node_and_the_smallest_pipelines_come_first():
    assert parallelisms(find_hardware("a100"), max_stages=2) == [
        split(1, 1),
        split(2, 1),
        split(1, 2),
        split(4, 1),
        split(2, 2),
        split(4, 2),
    ]
    assert [each.num_gpus for each in parallelisms(find_hardware("cpu"), max_stages=3)] == [1, 2, 3]


def test_what_weights_and_the_reserve_leave_is_kv():
    fit = check_fit(find_model("mistral-7b"), find_hardware("a100"), split(1, 1), max_model_len=8192)

    usable = 72 * 10**9 - 10**9
    assert fit == Fit(weight_bytes=MISTRAL_BYTES, num_blocks=(usable - MISTRAL_BYTES) // MISTRAL_BLOCK_BYTES)


def test_weights_that_are_larger_than_the_memory_are_told_in_gb():
    with pytest.raises(ConfigError, match=r"^does not fit: weights 69 GB of 42 GB$"):
        check_fit(find_model("yi-34b"), find_hardware("a40"), split(1, 1), max_model_len=4096)


@pytest.mark.parametrize(
    ("parallelism", "weights"),
    [
        (split(2, 1), 30 * YI_LAYER + YI_TABLE),
        (split(1, 2), 30 * YI_LAYER + YI_TABLE),
        (split(1, 3), 20 * YI_LAYER + YI_TABLE),
    ],
)
def test_ranks_and_stages_share_the_weights(parallelism: Parallelism, weights: int):
    fit = check_fit(find_model("yi-34b"), find_hardware("a40"), parallelism, max_model_len=4096)

    assert fit.weight_bytes == 2 * weights


def test_a_request_must_find_room_beside_the_weights():
    ten_blocks = (MISTRAL_BYTES + 10 * MISTRAL_BLOCK_BYTES + 10**9) / 0.5
    hardware = replace(find_hardware("a100"), memory_bytes=int(ten_blocks) + 2)
    model = find_model("mistral-7b")

    fit = check_fit(model, hardware, split(1, 1), max_model_len=160, gpu_memory_utilization=0.5)
    assert fit.num_blocks == 10
    with pytest.raises(ConfigError, match=r"weights of 14 GB of 15 GB.*KV of 160 tokens, a request may have 161"):
        check_fit(model, hardware, split(1, 1), max_model_len=161, gpu_memory_utilization=0.5)


def test_a_split_that_the_heads_or_the_layers_do_not_allow_is_refused():
    with pytest.raises(ConfigError, match="56 attention heads cannot be split over tensor_parallel_size=16"):
        check_fit(find_model("yi-34b"), find_hardware("h100"), split(16, 1), max_model_len=4096)
    with pytest.raises(ConfigError, match="32 layers cannot be split over 33 stages"):
        check_fit(find_model("mistral-7b"), find_hardware("h100"), split(1, 33), max_model_len=4096)
