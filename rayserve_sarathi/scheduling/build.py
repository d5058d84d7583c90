"""Put a scheduler together for a pipeline, the same one whether stages compute or a simulator stands in for them."""

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.kv.block_manager import BlockManager
from rayserve_sarathi.registry import load
from rayserve_sarathi.scheduling import SCHEDULERS
from rayserve_sarathi.scheduling.base import Scheduler
from rayserve_sarathi.step_shape import StepTimeModel


def max_steps_in_flight(num_stages: int) -> int:
    """Return how many steps to keep in flight: one a stage, and one that waits so that no stage does.

    With a single stage, one: a second would hold no decode (those are in the first), only delay the next ones.
    """
    return 1 if num_stages == 1 else num_stages + 1


def build_scheduler(
    config: SchedulerConfig,
    *,
    num_blocks: int,
    block_size: int,
    enable_prefix_caching: bool,
    max_model_len: int,
    vocab_size: int,
    num_stages: int,
    slo: SloConfig | None = None,
    prior: StepTimeModel | None = None,
    is_async: bool = False,
) -> Scheduler:
    """Build the scheduler of a pipeline of `num_stages`, each with `num_blocks` KV blocks.

    With several stages `is_async` changes nothing: they never wait for the scheduler.

    Raises:
        ConfigError: There is no such policy.
    """
    blocks = BlockManager(
        num_blocks,
        block_size=block_size,
        watermark=config.watermark,
        enable_prefix_caching=enable_prefix_caching,
    )
    scheduler: Scheduler = load("scheduler policy", config.policy, SCHEDULERS)(
        config,
        blocks,
        max_model_len=max_model_len,
        vocab_size=vocab_size,
        max_steps_in_flight=max_steps_in_flight(num_stages),
        num_decode_groups=num_stages,
        slo=slo,
        prior=prior,
        is_async=is_async and num_stages == 1,
    )
    return scheduler
