"""A pipeline that is not there: a model on named hardware under a policy, ready to be simulated."""

from collections.abc import Callable

from rayserve_sarathi.config import SchedulerConfig, SloConfig
from rayserve_sarathi.simulation.criteria import Criteria
from rayserve_sarathi.simulation.hardware import find_hardware
from rayserve_sarathi.simulation.model_shape import find_model, num_kv_blocks
from rayserve_sarathi.simulation.result import SimulationResult
from rayserve_sarathi.simulation.simulator import NoteStep, make_simulated_scheduler, simulate
from rayserve_sarathi.simulation.step_times import make_step_time_model
from rayserve_sarathi.simulation.system_config import SystemConfig
from rayserve_sarathi.simulation.virtual_pipeline import ModelledPipeline
from rayserve_sarathi.simulation.workload import Workload
from rayserve_sarathi.step_shape import StepTimeModel


class SimulatedSystem:
    """Runs workloads, each on a pipeline that is new.

    Args:
        step_times: Of the stages.
        num_blocks: KV blocks.
        max_model_len: Most tokens of a request; `block_size` and `scheduler` likewise as in `SystemConfig`.
        prior: What a scheduler believes of its steps at first; see `make_simulated_scheduler`.
    """

    def __init__(
        self,
        step_times: StepTimeModel,
        *,
        num_blocks: int,
        block_size: int,
        max_model_len: int,
        scheduler: SchedulerConfig,
        slo: SloConfig,
        prior: StepTimeModel | None = None,
    ) -> None:
        self._step_times = step_times
        self.num_blocks = num_blocks
        self._block_size = block_size
        self.max_model_len = max_model_len
        self._scheduler = scheduler
        self._slo = slo
        self._prior = prior

    def run(
        self,
        workload: Workload,
        *,
        give_up: Criteria | None = None,
        keeps_token_times: bool = False,
        note_step: NoteStep | None = None,
    ) -> SimulationResult:
        """Run `workload`; see `simulate`."""
        scheduler = make_simulated_scheduler(
            self._scheduler,
            num_blocks=self.num_blocks,
            block_size=self._block_size,
            max_model_len=self.max_model_len,
            num_stages=self._step_times.num_stages,
            slo=self._slo,
            prior=self._prior,
        )
        return simulate(
            workload,
            scheduler,
            ModelledPipeline(self._step_times),
            give_up=give_up,
            keeps_token_times=keeps_token_times,
            note_step=note_step,
        )

    def at_rates(self, workload: Workload, criteria: Criteria) -> Callable[[float], SimulationResult]:
        """Return what `find_capacity` asks for runs: of the same requests at any rate, given up when hopeless."""
        return lambda rate: self.run(workload.at_rate(rate), give_up=criteria)


def make_system(config: SystemConfig, *, prior: StepTimeModel | None = None) -> SimulatedSystem:
    """Return the system that `config` describes.

    Args:
        config: Of the system.
        prior: See `SimulatedSystem`.

    Raises:
        ConfigError: Something in it is unknown, or does not fit the rest.
    """
    parallel = {
        "tensor_parallel_size": config.tensor_parallel_size,
        "pipeline_parallel_size": config.pipeline_parallel_size,
    }
    step_times = make_step_time_model(
        config.model,
        config.hardware,
        source="roofline" if config.profiles is None else "profile",
        profiles=config.profiles,
        **parallel,
    )
    num_blocks = config.num_blocks
    if num_blocks is None:
        num_blocks = num_kv_blocks(
            find_model(config.model),
            find_hardware(config.hardware),
            block_size=config.block_size,
            gpu_memory_utilization=config.gpu_memory_utilization,
            **parallel,
        )
    return SimulatedSystem(
        step_times,
        num_blocks=num_blocks,
        block_size=config.block_size,
        max_model_len=config.max_model_len,
        scheduler=config.scheduler,
        slo=config.slo,
        prior=prior,
    )
