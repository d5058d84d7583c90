import torch

from rayserve_sarathi.kernels.kv_write import write_kv


def test_tokens_land_in_their_slots_and_nowhere_else() -> None:
    k, v = torch.randn(3, 2, 4), torch.randn(3, 2, 4)
    k_cache, v_cache = torch.ones(5, 2, 4, 4), torch.ones(5, 2, 4, 4)

    write_kv(k, v, k_cache, v_cache, slot_mapping=torch.tensor([9, 3, 16]), new_block_ids=torch.tensor([4]))

    for new, cache in ((k, k_cache), (v, v_cache)):
        expected = torch.ones(5, 2, 4, 4)
        expected[4] = 0
        expected[2, :, 1], expected[0, :, 3], expected[4, :, 0] = new
        assert torch.equal(cache, expected)
