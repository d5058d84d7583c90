import threading

from rayserve_sarathi.openai.prompts import derive_seed, off_loop


def test_seeds_of_choices_differ_and_stay_in_range():
    for seed in (0, 7, 2**64 - 1):
        seeds = [derive_seed(seed, index) for index in range(16)]

        assert seeds[0] == seed
        assert len(set(seeds)) == 16
        assert all(0 <= derived < 2**64 for derived in seeds)


async def test_little_work_is_done_at_once_and_much_in_a_thread():
    assert await off_loop(10, threading.get_ident) == threading.get_ident()
    assert await off_loop(10**6, threading.get_ident) != threading.get_ident()
