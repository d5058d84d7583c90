"""Blocks: owned, shared, revived, evicted."""

import pytest

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.request import Request
from tests.factories import make_request


def compute(blocks: BlockManager, request: Request) -> None:
    """Admit `request` and pretend that all its tokens were computed."""
    prefix = blocks.find_prefix(request)
    assert blocks.allocate(request, prefix, num_tokens=request.num_tokens, keep_watermark=False)
    request.num_computed_tokens = request.num_tokens
    blocks.share_computed(request, len(prefix) * blocks.block_size)


def test_a_pool_without_blocks_is_refused():
    with pytest.raises(ConfigError, match="at least 1 block"):
        BlockManager(0, block_size=16)


def test_requests_with_one_prefix_hold_the_same_blocks():
    blocks = BlockManager(8, block_size=4)
    first, second = make_request("first", prompt=range(10)), make_request("second", prompt=range(12))
    compute(blocks, first)
    compute(blocks, second)

    assert first.block_table[:2] == second.block_table[:2]
    assert len({*first.block_table, *second.block_table}) == 4
    blocks.check_integrity([first, second])


def test_a_block_is_named_by_all_tokens_before_it():
    blocks = BlockManager(16, block_size=4)
    first = make_request("first", prompt=[1, 1, 1, 1, 9, 9, 9, 9, 5])
    second = make_request("second", prompt=[2, 2, 2, 2, 9, 9, 9, 9, 5])
    compute(blocks, first)

    assert blocks.find_prefix(second) == []


def test_a_full_hit_leaves_the_last_token_to_compute():
    blocks = BlockManager(8, block_size=4)
    first, second = make_request("first", prompt=range(8)), make_request("second", prompt=range(8))
    compute(blocks, first)

    assert blocks.find_prefix(second) == first.block_table[:1].tolist()


def test_a_freed_prefix_is_revived():
    blocks = BlockManager(4, block_size=4)
    first, second = make_request("first", prompt=range(10)), make_request("second", prompt=range(10))
    compute(blocks, first)
    table = first.block_table.tolist()
    blocks.free(first)
    assert blocks.usage == 0
    compute(blocks, second)

    assert second.block_table.tolist()[:2] == table[:2]


def test_the_end_of_a_sequence_is_evicted_before_its_beginning():
    blocks = BlockManager(4, block_size=4)
    first, other, again = (make_request(name, prompt=range(16)) for name in ("first", "other", "again"))
    compute(blocks, first)
    blocks.free(first)
    intruder = make_request("intruder", prompt=8)
    compute(blocks, intruder)

    assert len(blocks.find_prefix(again)) == 2
    assert other.block_table.tolist() == []


def test_an_allocation_that_does_not_fit_changes_nothing():
    blocks = BlockManager(4, block_size=4, watermark=0.25)
    request = make_request("a", prompt=16)

    assert not blocks.allocate(request, [], num_tokens=request.num_tokens, keep_watermark=True)
    assert request.block_table.tolist() == []
    assert blocks.allocate(request, [], num_tokens=request.num_tokens, keep_watermark=False)


def test_a_revived_block_does_not_count_as_free_for_the_same_request():
    blocks = BlockManager(4, block_size=4)
    first, second = make_request("first", prompt=range(16)), make_request("second", prompt=range(20))
    compute(blocks, first)
    blocks.free(first)
    prefix = blocks.find_prefix(second)

    assert len(prefix) == 4
    assert not blocks.allocate(second, prefix, num_tokens=second.num_tokens, keep_watermark=False)


def test_without_prefix_caching_nothing_is_shared():
    blocks = BlockManager(8, block_size=4, enable_prefix_caching=False)
    first, second = make_request("first", prompt=range(10)), make_request("second", prompt=range(10))
    compute(blocks, first)
    compute(blocks, second)

    assert not set(first.block_table) & set(second.block_table)


def test_blocks_shared_later_are_shared_a_few_at_a_time_unless_given_back():
    blocks = BlockManager(16, block_size=4)
    requests = [make_request(f"request-{index}", prompt=[index] * 4) for index in range(4)]
    for request in requests:
        assert blocks.allocate(request, [], num_tokens=request.num_tokens, keep_watermark=False)
        request.num_computed_tokens = 4
        blocks.share_later(request, 0)
    blocks.free(requests[0])
    blocks.share_pending(1)
    found = [bool(blocks.find_prefix(make_request("again", prompt=[index] * 5))) for index in range(4)]
    blocks.share_pending(2)

    assert found == [False, True, False, False]
    assert all(blocks.find_prefix(make_request("again", prompt=[index] * 5)) for index in (1, 2, 3))
    blocks.check_integrity(requests)
