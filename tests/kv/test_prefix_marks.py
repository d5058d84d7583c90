"""Marks of prefixes: few, comparable, and true."""

from array import array

from rayserve_sarathi.kv.prefix_marks import marks_of_prompt, unpack_marks
from tests.factories import make_request, make_scheduler
from tests.scheduling.driver import Driver


def marks(*tokens: int, salt: str = ""):
    return marks_of_prompt(array("i", tokens), block_size=4, cache_salt=salt)


def test_a_prompt_knows_how_much_of_it_another_one_shares():
    prompt = marks(*range(100))

    assert prompt.num_known_tokens(marks(*range(50), *range(50)).marks) == 48
    assert prompt.num_known_tokens(marks(*range(1, 100)).marks) == 0
    assert prompt.num_known_tokens(marks(*range(100), salt="other").marks) == 0


def test_the_last_token_is_never_saved():
    assert marks(*range(8)).num_known_tokens(marks(*range(8)).marks) == 4
    assert marks(*range(4)).marks == ()


def test_a_long_prompt_has_few_marks():
    prompt = marks(*range(4097))

    assert len(prompt.marks) == 36
    assert prompt.num_known_tokens(prompt.marks) == 4096
    assert prompt.num_known_tokens(marks(*range(3001)).marks) == 2560  # 640 of 750 blocks


def test_a_scheduler_publishes_what_it_has_cached():
    scheduler = make_scheduler(num_blocks=16, block_size=4)
    driver = Driver(scheduler, num_blocks=16, block_size=4)
    prompt = marks(*range(21))
    assert prompt.num_known_tokens(unpack_marks(scheduler.pack_marks())) == 0

    driver.add(make_request("first", prompt=range(21), max_tokens=1))
    driver.run()
    published = scheduler.pack_marks()
    assert prompt.num_known_tokens(unpack_marks(published)) == 20
    assert scheduler.pack_marks() == published

    driver.add(make_request("evicts-it", prompt=[7] * 60, max_tokens=1))
    driver.run()
    assert prompt.num_known_tokens(unpack_marks(scheduler.pack_marks())) < 20


def test_a_scheduler_publishes_what_it_generated():
    scheduler = make_scheduler(num_blocks=16, block_size=4)
    driver = Driver(scheduler, num_blocks=16, block_size=4)
    request = make_request("first", prompt=range(10), max_tokens=12)
    driver.add(request)
    driver.run()

    conversation = marks(*request.token_ids, 1, 2, 3)
    assert conversation.num_known_tokens(unpack_marks(scheduler.pack_marks())) == 20
