"""What the baselines of the paper put into a step, in which they differ from `sarathi`."""

from rayserve_sarathi.scheduling.base import Scheduler
from tests.factories import make_request, make_scheduler
from tests.scheduling.driver import Driver

MAX_MODEL_LEN = 64


def make_driver(policy: str, *, num_blocks: int = 64, **settings: int) -> Driver:
    """Make a policy over blocks of 4 tokens, for requests of up to 64 tokens."""
    scheduler: Scheduler = make_scheduler(
        policy,
        num_blocks=num_blocks,
        max_model_len=MAX_MODEL_LEN,
        enable_prefix_caching=False,
        **{"token_budget": 8, **settings},
    )
    return Driver(scheduler, num_blocks=num_blocks, block_size=4)


def step(driver: Driver) -> dict[str, int]:
    """Compute one step; return its tokens by request."""
    submitted = driver.submit()
    assert submitted is not None
    driver.land()
    return submitted.num_scheduled_tokens


def test_vllm_computes_whole_prompts_before_any_decode():
    driver = make_driver("vllm")
    driver.add(make_request("first", prompt=6, max_tokens=4))

    assert step(driver) == {"first": 6}
    assert step(driver) == {"first": 1}
    driver.add(make_request("long", prompt=40, max_tokens=4))
    driver.add(make_request("short", prompt=5, max_tokens=4))
    # The decode of "first" is stalled.
    assert step(driver) == {"long": 40, "short": 5}
    assert step(driver) == {"first": 1, "long": 1, "short": 1}


def test_vllm_takes_prompts_of_at_most_max_model_len_tokens_together():
    driver = make_driver("vllm")
    for name in ("a", "b", "c"):
        driver.add(make_request(name, prompt=30, max_tokens=2))

    assert step(driver) == {"a": 30, "b": 30}
    assert step(driver) == {"c": 30}
    assert step(driver) == {"a": 1, "b": 1, "c": 1}


def test_vllm_preempts_the_newest_when_no_block_is_free():
    driver = make_driver("vllm", num_blocks=16)
    driver.add(make_request("old", prompt=31, max_tokens=8))
    driver.add(make_request("new", prompt=31, max_tokens=8))
    driver.run()

    assert driver.scheduler.metrics.num_preemptions > 0
    assert {name: len(tokens) for name, tokens in driver.tokens.items()} == {"old": 8, "new": 8}


def test_orca_computes_whole_prompts_beside_the_decodes():
    driver = make_driver("orca")
    driver.add(make_request("first", prompt=6, max_tokens=4))

    assert step(driver) == {"first": 6}
    driver.add(make_request("long", prompt=40, max_tokens=4))
    driver.add(make_request("other", prompt=40, max_tokens=4))
    assert step(driver) == {"first": 1, "long": 40, "other": 40}


def test_orca_and_faster_transformer_hold_the_memory_of_the_longest_request_from_the_beginning():
    for policy in ("orca", "faster_transformer"):
        driver = make_driver(policy, num_blocks=2 * MAX_MODEL_LEN // 4)
        for name in ("a", "b", "c"):
            driver.add(make_request(name, prompt=4, max_tokens=4))

        assert step(driver) == {"a": 4, "b": 4}
        assert driver.scheduler.state().kv_cache_usage == 1
        driver.run()
        assert driver.scheduler.metrics.num_preemptions == 0


def test_faster_transformer_finishes_a_batch_before_the_next_one_begins():
    driver = make_driver("faster_transformer", max_num_seqs=2)
    driver.add(make_request("short", prompt=6, max_tokens=2))
    driver.add(make_request("long", prompt=40, max_tokens=4))
    driver.add(make_request("next", prompt=5, max_tokens=2))

    assert step(driver) == {"short": 6, "long": 40}
    assert step(driver) == {"short": 1, "long": 1}
    assert step(driver) == {"long": 1}  # the place of "short" stays empty
    assert step(driver) == {"long": 1}
    assert step(driver) == {"next": 5}


def test_chunked_only_takes_chunks_and_decodes_in_turn():
    driver = make_driver("chunked_only")
    driver.add(make_request("first", prompt=6, max_tokens=8))

    assert step(driver) == {"first": 6}
    driver.add(make_request("long", prompt=20, max_tokens=4))
    assert step(driver) == {"first": 1}
    assert step(driver) == {"long": 8}
    assert step(driver) == {"first": 1}
    assert step(driver) == {"long": 8}
    assert step(driver) == {"first": 1}
    assert step(driver) == {"long": 4}
    assert step(driver) == {"first": 1, "long": 1}


def test_hybrid_only_takes_a_whole_prompt_beside_the_decodes():
    driver = make_driver("hybrid_only")
    driver.add(make_request("first", prompt=6, max_tokens=4))

    assert step(driver) == {"first": 6}
    driver.add(make_request("long", prompt=40, max_tokens=4))
    driver.add(make_request("other", prompt=40, max_tokens=4))
    assert step(driver) == {"first": 1, "long": 40}
    assert step(driver) == {"first": 1, "long": 1, "other": 40}
