"""Machines and traffic that figures are tested with."""

from rayserve_sarathi.config import DEFAULT_BLOCK_SIZE
from rayserve_sarathi.simulation.figures.experiment import Experiment
from rayserve_sarathi.simulation.figures.machine import Machine
from rayserve_sarathi.simulation.workload import SHAREGPT_LENGTHS

YI = Machine(model="yi-34b", hardware="a100", tensor_parallel_size=2)
YI_PIPELINE = Machine(model="yi-34b", hardware="a100", tensor_parallel_size=2, pipeline_parallel_size=2)


def make_experiment(machine: Machine, *, seed: int = 0) -> Experiment:
    return Experiment(
        model=machine.step_times(),
        num_blocks=machine.num_kv_blocks(DEFAULT_BLOCK_SIZE),
        max_model_len=8192,
        lengths=SHAREGPT_LENGTHS,
        seed=seed,
    )
