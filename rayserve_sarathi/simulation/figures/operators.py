"""Where the time of a step goes, by operator, against the length of what it sees (paper, section 3.1)."""

from collections.abc import Sequence
from dataclasses import dataclass

from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.figures.machine import decode_step, prompt_step
from rayserve_sarathi.step_shape import StepShape

LENGTHS = (512, 1024, 2048, 4096, 8192)

GROUPS = {
    "MLP products": ("up", "down"),
    "QKV and output products": ("qkv", "o"),
    "attention": ("decode_attention", "chunk_attention"),
    "norms, rotary, activation, adds": ("norm", "rope", "activation", "add"),
    "embedding, head, sampler": ("embedding", "head_and_sampler"),
    "all-reduce, transfer": ("all_reduce", "transfer"),
    "CPU": ("cpu",),
}
"""Parts of `CostModel.parts_s` by what a reader wants to tell apart; each is in one of them."""
LINEAR = ("MLP products", "QKV and output products")


@dataclass(frozen=True, slots=True, kw_only=True)
class OperatorSeries:
    """A step for each length.

    Args:
        lengths: Tokens of the prompt, or of each decode's context.
        num_decodes: Decodes in a step of them.
        prefill_s: Seconds of each group, by its name, in the steps of one prompt; they add up to the step.
        decode_s: The same for the steps of decodes.
    """

    lengths: tuple[int, ...]
    num_decodes: int
    prefill_s: dict[str, tuple[float, ...]]
    decode_s: dict[str, tuple[float, ...]]


def time_by_operator(model: CostModel, *, num_decodes: int = 32, lengths: Sequence[int] = LENGTHS) -> OperatorSeries:
    """Return the times over all layers and stages, of steps that have the pipeline for themselves."""
    return OperatorSeries(
        lengths=tuple(lengths),
        num_decodes=num_decodes,
        prefill_s=_grouped(model, [prompt_step(1, length) for length in lengths]),
        decode_s=_grouped(model, [decode_step(num_decodes, length) for length in lengths]),
    )


def linear_share(groups_s: dict[str, tuple[float, ...]], index: int) -> float:
    """Return the share of the linear layers in the step at `index`."""
    return sum(groups_s[name][index] for name in LINEAR) / sum(values[index] for values in groups_s.values())


def _grouped(model: CostModel, shapes: Sequence[StepShape]) -> dict[str, tuple[float, ...]]:
    steps = [model.parts_s(shape) for shape in shapes]
    return {name: tuple(sum(step[part] for part in parts) for step in steps) for name, parts in GROUPS.items()}
