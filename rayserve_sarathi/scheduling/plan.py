"""What the scheduler decided for a step, before it is packed for the stages, and the steps that are just like it."""

from dataclasses import dataclass

from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.request import Request
from rayserve_sarathi.step_shape import StepShape


@dataclass(frozen=True, slots=True)
class StepPlan:
    """One step.

    Args:
        step_id: Its number.
        decodes: Requests that compute the token they generated last.
        prefills: Tokens of each of the other requests, single ones first.
        sampled_prefills: Those of `prefills` whose chunk ends their known tokens, in the same order.
        launched_s: When it was made.
    """

    step_id: int
    decodes: list[Request]
    prefills: dict[Request, int]
    sampled_prefills: list[Request]
    launched_s: float

    @property
    def num_tokens(self) -> int:
        """Tokens in the step."""
        return len(self.decodes) + sum(self.prefills.values())

    @property
    def num_scheduled_tokens(self) -> dict[str, int]:
        """Tokens of each request in this step, by request id."""
        chunks = {request.request_id: num_new for request, num_new in self.prefills.items()}
        return {request.request_id: 1 for request in self.decodes} | chunks

    def shape(self) -> StepShape:
        """Return its sizes, as `step_shape.shape_of` does for a `StepInput`; the step must be the newest in flight."""
        num_decodes = len(self.decodes)
        context_tokens = sum([request.num_computed_tokens for request in self.decodes])
        chunks = []
        for request, num_new in self.prefills.items():
            context_len = request.num_scheduled_tokens - num_new
            if num_new == 1:
                num_decodes += 1
                context_tokens += context_len
            else:
                chunks.append((num_new, context_len))
        return StepShape(
            num_decodes=num_decodes,
            decode_context_tokens=context_tokens,
            chunks=tuple(chunks),
            num_samples=len(self.decodes) + len(self.sampled_prefills),
        )


def next_alike(shape: StepShape) -> StepShape:
    """Return the shape of the step after one of this `shape`: each decode and each chunk has moved on by its length."""
    return StepShape(
        num_decodes=shape.num_decodes,
        decode_context_tokens=shape.decode_context_tokens + shape.num_decodes,
        chunks=tuple([(query_len, context_len + query_len) for query_len, context_len in shape.chunks]),
        num_samples=shape.num_samples,
    )


def count_alike(plan: StepPlan, *, block_size: int, num_free_blocks: int) -> int:
    """Return for how many steps, this one included, its requests can go on as in it, whatever else happens.

    The last of them may be the last one of a decode; no prompt is complete before the next one, no decode lacks a block
    in any. The step is in flight.
    """
    if plan.sampled_prefills:
        return 1
    nums_left = [request.max_num_tokens - len(request.token_ids) for request in plan.decodes]
    for request, num_new in plan.prefills.items():
        nums_left.append((request.num_tokens - request.num_scheduled_tokens - 1) // num_new + 1)
    num_steps = min(nums_left)
    # At most so many blocks are needed; where they may not be there, look closely.
    if len(plan.decodes) * -(-(num_steps - 1) // block_size) > num_free_blocks:
        growth = block_growth(plan.decodes, num_steps, block_size=block_size)
        if len(growth) > num_free_blocks:
            num_steps = growth[num_free_blocks][0] - 1
    return num_steps


def block_growth(decodes: list[Request], num_steps: int, *, block_size: int) -> list[tuple[int, int]]:
    """Return when each of `decodes` needs another block within `num_steps` like the present one, in order.

    Returns:
        (step, index into `decodes`); the present step, which has its blocks, is step 1.
    """
    growth = []
    for index, request in enumerate(decodes):
        step = len(request.block_table) * block_size - len(request.token_ids) + 2
        while step <= num_steps:
            growth.append((step, index))
            step += block_size
    growth.sort()
    return growth


def grow_alike(decodes: list[Request], num_steps: int, blocks: BlockManager) -> None:
    """Give `decodes` the blocks that they need within `num_steps` like the present one, in the order of need."""
    block_size = blocks.block_size
    for _, index in block_growth(decodes, num_steps, block_size=block_size):
        request = decodes[index]
        is_grown = blocks.grow(request, len(request.block_table) * block_size + 1)
        assert is_grown, f"no block for {request}, though there should be"
