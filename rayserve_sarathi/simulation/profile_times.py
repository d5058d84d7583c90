"""Times of operators as measured, scaled to the shape of the model where the profile is of a similar one."""

from collections.abc import Mapping

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.interpolation import ChunkTable, Curve, DecodeTable
from rayserve_sarathi.simulation.model_shape import RankShape
from rayserve_sarathi.simulation.profile_files import LAYER_ELEMENTWISE, LAYER_MATRICES, OperatorProfile
from rayserve_sarathi.simulation.roofline import RooflineTimes


class ProfileTimes:
    """Operators of a rank, as a profile has them.

    Args:
        shape: Of the rank.
        profile: Of the hardware, a model with layers like these, and as many ranks.
        roofline: Of the same rank, for what the profile's model had less of in its head.
        is_multi_node: Whether the next stage is on another node.

    Raises:
        ConfigError: The profile lacks an operator that this parallelism needs.
    """

    def __init__(
        self,
        shape: RankShape,
        profile: Mapping[str, OperatorProfile],
        *,
        roofline: RooflineTimes,
        is_multi_node: bool,
    ) -> None:
        self._shape = shape
        self._roofline = roofline
        work = {operator: float(shape.matrix_flops(operator)) for operator in (*LAYER_MATRICES, "head")}
        work |= {operator: float(shape.elements(operator)) for operator in (*LAYER_ELEMENTWISE, "embedding")}
        self._scale = {operator: work[operator] / profile[operator].work for operator in work if operator in profile}
        counts = {"norm": shape.num_norms, "add": 2}
        self._scale |= {operator: self._scale[operator] * count for operator, count in counts.items()}
        self._curves = {
            operator: Curve(measured.points)
            for operator, measured in profile.items()
            if operator not in {"decode_attention", "chunk_attention"}
        }
        self._send = "send_between_nodes" if is_multi_node else "send"
        needed = ["all_reduce"] * (shape.tp_size > 1) + [self._send] * (len(shape.layers_per_stage) > 1)
        if missing := [operator for operator in needed if operator not in self._curves]:
            raise ConfigError(
                f"the profile has no {' and no '.join(missing)} for tensor_parallel_size={shape.tp_size} and"
                f" {len(shape.layers_per_stage)} stages; measure it, or predict by data sheet"
            )
        decode, chunk = profile["decode_attention"], profile["chunk_attention"]
        self._decode = DecodeTable(decode.points, scale=2 * shape.kv_size / decode.work)
        self._chunk = ChunkTable(chunk.points, scale=4 * shape.q_size / chunk.work)
        # The sampler was measured with the head of the profile's model in it.
        self._head_share = max(0.0, 1 - profile["sample"].work / work["head"])

    def token_operators_s(self, num_tokens: int) -> Mapping[str, float]:
        """See `OperatorTimes`."""
        matrices = {
            operator: self._scale[operator] * self._curves[operator].at_tile(num_tokens, self._roofline.tile_tokens)
            for operator in LAYER_MATRICES
        }
        return matrices | {
            operator: self._scale[operator] * self._curves[operator].at(num_tokens) for operator in LAYER_ELEMENTWISE
        }

    def embedding_s(self, num_tokens: int) -> float:
        """See `OperatorTimes`."""
        return self._scale["embedding"] * self._curves["embedding"].at(num_tokens)

    def sample_s(self, num_samples: int) -> float:
        """See `OperatorTimes`. What the head is larger than the profile's is added by data sheet."""
        if not num_samples:
            return 0.0
        return self._curves["sample"].at(num_samples) + self._head_share * self._roofline.sample_s(num_samples)

    def decode_attention_s(self, num_decodes: int, context_tokens: float) -> float:
        """See `OperatorTimes`."""
        return self._decode.at(num_decodes, context_tokens)

    def chunk_attention_s(self, query_len: int, context_len: int) -> float:
        """See `OperatorTimes`."""
        return self._chunk.at(query_len, context_len)

    def all_reduce_s(self, num_bytes: int) -> float:
        """See `OperatorTimes`."""
        return self._curves["all_reduce"].at(num_bytes) if self._shape.tp_size > 1 else 0.0

    def send_s(self, num_bytes: int) -> float:
        """See `OperatorTimes`."""
        return self._curves[self._send].at(num_bytes)

    def schedule_s(self, num_requests: int) -> float:
        """See `OperatorTimes`."""
        return self._curves["schedule"].at(num_requests)

    def prepare_s(self, num_requests: int) -> float:
        """See `OperatorTimes`."""
        return self._curves["prepare"].at(num_requests)
