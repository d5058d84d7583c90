"""Times of operators from a data sheet: the longer of computing and of moving bytes (Williams et al., 2009).

A matrix product is computed in whole tiles of `tile_tokens` rows, so that 257 tokens cost as much as 384 in it; the
paper (section 4.3) saw a step of 257 tokens take a third more time than one of 256.
"""

from collections.abc import Mapping

from rayserve_sarathi.simulation.hardware import Hardware
from rayserve_sarathi.simulation.model_shape import RankShape

_NORM_PASSES = 2  # read and written
_ADD_PASSES = 3
_NUM_ADDS = 2


class RooflineTimes:
    """Operators of a rank on named hardware.

    Args:
        shape: Of the rank.
        hardware: Whose peaks and efficiencies to take.
        is_multi_node: Whether the next stage is on another node.
    """

    def __init__(self, shape: RankShape, hardware: Hardware, *, is_multi_node: bool) -> None:
        self._shape = shape
        self._hardware = hardware
        self._is_multi_node = is_multi_node
        self._flops_per_s = hardware.peak_flops * hardware.compute_efficiency
        self._bytes_per_s = hardware.memory_bandwidth * hardware.memory_efficiency
        # Of one pair of query and key, of one token of KV: FLOPs of both products over all query heads; K and V.
        attention_flops_per_s = hardware.peak_flops * hardware.attention_compute_efficiency
        attention_bytes_per_s = hardware.memory_bandwidth * hardware.attention_memory_efficiency
        self._pair_s = 4 * shape.q_size / attention_flops_per_s
        self._kv_token_s = 2 * shape.kv_size * hardware.itemsize / attention_bytes_per_s

    @property
    def tile_tokens(self) -> int:
        """Rows that a matrix product of the hardware is padded to."""
        return self._hardware.tile_tokens

    def token_operators_s(self, num_tokens: int) -> Mapping[str, float]:
        """See `OperatorTimes`."""
        shape = self._shape
        return {
            "norm": shape.num_norms * self._elementwise_s("norm", num_tokens, passes=_NORM_PASSES),
            "qkv": self.matrix_s("qkv", num_tokens),
            "rope": self._elementwise_s("rope", num_tokens, passes=_NORM_PASSES),
            "o": self.matrix_s("o", num_tokens),
            "up": self.matrix_s("up", num_tokens),
            "activation": self._elementwise_s("activation", num_tokens, passes=1 + 1 / shape.num_up),
            "down": self.matrix_s("down", num_tokens),
            "add": _NUM_ADDS * self._elementwise_s("add", num_tokens, passes=_ADD_PASSES),
        }

    def embedding_s(self, num_tokens: int) -> float:
        """See `OperatorTimes`."""
        return self._elementwise_s("embedding", num_tokens, passes=2)

    def sample_s(self, num_samples: int) -> float:
        """See `OperatorTimes`. Sampling itself is counted as part of the host's time."""
        return self.matrix_s("head", num_samples) if num_samples else 0.0

    def decode_attention_s(self, num_decodes: int, context_tokens: float) -> float:
        """See `OperatorTimes`."""
        num_keys = context_tokens + num_decodes
        return self._hardware.launch_s + num_keys * max(self._kv_token_s, self._pair_s)

    def chunk_attention_s(self, query_len: int, context_len: int) -> float:
        """See `OperatorTimes`. Queries are padded to whole tiles, and masked keys are not computed."""
        tile = self._hardware.tile_tokens
        rows = -(-query_len // tile) * tile
        compute_s = rows * (context_len + (query_len + 1) / 2) * self._pair_s
        return self._hardware.launch_s + max(compute_s, (context_len + query_len) * self._kv_token_s)

    def all_reduce_s(self, num_bytes: int) -> float:
        """See `OperatorTimes`. A ring sends each part 2 (n - 1) times over."""
        size = self._shape.tp_size
        if size == 1:
            return 0.0
        hardware = self._hardware
        bandwidth = hardware.collective_bandwidth(size) * hardware.link_efficiency
        return hardware.collective_latency_s + 2 * (size - 1) / size * num_bytes / bandwidth

    def send_s(self, num_bytes: int) -> float:
        """See `OperatorTimes`. Each rank sends all of the hidden states to its counterpart."""
        hardware = self._hardware
        if self._is_multi_node:
            # The ranks of a stage share the node's way out.
            bandwidth, latency_s = hardware.network_bandwidth / self._shape.tp_size, hardware.network_latency_s
        else:
            bandwidth, latency_s = hardware.slow_link_bandwidth, hardware.link_latency_s
            if self._shape.tp_size * len(self._shape.layers_per_stage) <= hardware.devices_per_link_group:
                bandwidth = hardware.link_bandwidth
        return latency_s + num_bytes / (bandwidth * hardware.link_efficiency)

    def schedule_s(self, num_requests: int) -> float:
        """See `OperatorTimes`. It has all of the host's time; `prepare_s` none."""
        return self._hardware.host_step_s + num_requests * self._hardware.host_request_s

    def prepare_s(self, num_requests: int) -> float:
        """See `OperatorTimes`."""
        return 0.0

    def matrix_s(self, operator: str, num_tokens: int) -> float:
        """Return the time of a product by its name in `RankShape.matrix`, over all experts that tokens go to."""
        shape, hardware = self._shape, self._hardware
        num_in, num_out = shape.matrix(operator)
        num_matrices, num_per_token = shape.experts_of(operator)
        rows = num_tokens * num_per_token
        # Experts that none of the tokens goes to are not read; tokens choose as if by chance.
        num_read = num_matrices * (1 - (1 - num_per_token / num_matrices) ** num_tokens)
        tile = hardware.tile_tokens
        rows_each = rows / num_read
        padded = num_read * -(-rows_each // tile) * tile
        compute_s = padded * 2 * num_in * num_out / self._flops_per_s
        num_bytes = hardware.itemsize * (num_read * num_in * num_out + rows * (num_in + num_out))
        return hardware.launch_s + max(compute_s, num_bytes / self._bytes_per_s)

    def _elementwise_s(self, operator: str, num_tokens: int, *, passes: float) -> float:
        num_bytes = passes * num_tokens * self._shape.elements(operator) * self._hardware.itemsize
        return self._hardware.launch_s + num_bytes / self._bytes_per_s
