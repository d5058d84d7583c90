"""What a step's time is summed from, whoever knows it: data sheets (`roofline`) or measurements (`profile_times`)."""

from collections.abc import Mapping
from typing import Protocol


class OperatorTimes(Protocol):
    """Seconds of each operator on one rank; those of a layer are of a single layer.

    `decode_attention_s` and `chunk_attention_s` are called for every step and must take microseconds; the others are
    asked once for each argument.
    """

    def token_operators_s(self, num_tokens: int) -> Mapping[str, float]:
        """Return the times of all operators of a layer that see tokens one by one: everything but attention.

        Their names are norm, qkv, rope, o, up, activation, down and add. Where a layer has several norms or adds, each
        is the sum of them.
        """

    def embedding_s(self, num_tokens: int) -> float:
        """Return the time to look up tokens."""

    def sample_s(self, num_samples: int) -> float:
        """Return the time of the head and the sampler for so many tokens."""

    def decode_attention_s(self, num_decodes: int, context_tokens: float) -> float:
        """Return the time of attention of decodes to contexts of so many tokens, all together."""

    def chunk_attention_s(self, query_len: int, context_len: int) -> float:
        """Return the time of attention of a chunk to its context and to itself."""

    def all_reduce_s(self, num_bytes: int) -> float:
        """Return the time of an all-reduce over the ranks of a stage, 0 for a single one."""

    def send_s(self, num_bytes: int) -> float:
        """Return the time of hidden states from a stage to the next."""

    def schedule_s(self, num_requests: int) -> float:
        """Return the CPU time of a step outside the stages: scheduling, dispatch, and taking in what was sampled."""

    def prepare_s(self, num_requests: int) -> float:
        """Return the CPU time that each stage takes before it computes."""
