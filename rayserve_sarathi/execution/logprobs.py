"""Log-probabilities of chosen tokens and of the most likely ones, from logits as the model gave them.

Dimensions: n positions; V vocabulary.
"""

import torch
from torch import Tensor

from rayserve_sarathi.request import TokenLogprobs


def token_logprobs(logprobs: Tensor, token_ids: list[int], num_logprobs: list[int]) -> list[TokenLogprobs]:
    """Report one token, and the most likely ones, at each position.

    Args:
        logprobs: [n, V] float32.
        token_ids: The token at each position, n.
        num_logprobs: How many of the most likely to report at each position, n.
    """
    index = torch.tensor(token_ids, dtype=torch.int64, device=logprobs.device)
    chosen = logprobs.gather(1, index[:, None])[:, 0].tolist()
    top = logprobs.topk(min(max(num_logprobs), logprobs.shape[1]), dim=1)
    rows = zip(token_ids, chosen, num_logprobs, top.indices.tolist(), top.values.tolist(), strict=True)
    return [
        TokenLogprobs(token_id, logprob, tuple(top_ids[:count]), tuple(top_logprobs[:count]))
        for token_id, logprob, count, top_ids, top_logprobs in rows
    ]
