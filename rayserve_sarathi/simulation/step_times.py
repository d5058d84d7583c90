"""Make the step-time model of a model on named hardware."""

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from rayserve_sarathi.errors import ConfigError
from rayserve_sarathi.simulation.cost_model import CostModel
from rayserve_sarathi.simulation.hardware import Hardware, find_hardware
from rayserve_sarathi.simulation.model_shape import find_model, rank_shape
from rayserve_sarathi.simulation.operator_times import OperatorTimes
from rayserve_sarathi.simulation.profile_files import OperatorProfile, read_profile
from rayserve_sarathi.simulation.profile_times import ProfileTimes
from rayserve_sarathi.simulation.public_profiles import convert_public_profiles, has_public_profiles
from rayserve_sarathi.simulation.roofline import RooflineTimes

Source = Literal["roofline", "profile"]


def make_step_time_model(
    model: str,
    hardware: str,
    *,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    source: Source = "roofline",
    profiles: Path | None = None,
) -> CostModel:
    """Return what predicts the steps of a pipeline.

    Args:
        model: See `model_shape.find_model`.
        hardware: See `hardware.HARDWARE`.
        tensor_parallel_size: Ranks of a stage.
        pipeline_parallel_size: Stages.
        source: Data sheets, or measurements in `profiles`.
        profiles: Folder of files as `profile_files` describes them, or as `public_profiles` does.

    Raises:
        ConfigError: One of these is unknown, does not fit the others, or was not measured.
    """
    device = find_hardware(hardware)
    shape = rank_shape(
        find_model(model),
        tensor_parallel_size=tensor_parallel_size,
        pipeline_parallel_size=pipeline_parallel_size,
    )
    is_multi_node = tensor_parallel_size * pipeline_parallel_size > device.devices_per_node
    roofline = RooflineTimes(shape, device, is_multi_node=is_multi_node)
    times: OperatorTimes = roofline
    if source == "profile":
        if profiles is None:
            raise ConfigError("source profile needs the folder of the profiles; give it, or use source roofline")
        profile = find_profile(profiles, model, device, tensor_parallel_size=tensor_parallel_size)
        times = ProfileTimes(shape, profile, roofline=roofline, is_multi_node=is_multi_node)
    return CostModel(shape, times, itemsize=device.itemsize)


def find_profile(
    folder: Path, model: str, hardware: Hardware, *, tensor_parallel_size: int
) -> Mapping[str, OperatorProfile]:
    """Return a profile: a file of our format, or else converted from the public ones in the same folder.

    Raises:
        ConfigError: There is neither, or it is malformed.
    """
    name = profile_name(hardware.name, model, tensor_parallel_size=tensor_parallel_size)
    for path in (folder / name, (folder / name).with_suffix(".parquet")):
        if path.is_file():
            return read_profile(path)
    if has_public_profiles(folder):
        return convert_public_profiles(folder, model, hardware, tensor_parallel_size=tensor_parallel_size)
    raise ConfigError(f"{folder} has neither {name} nor the public profiles; see the module profile_files")


def profile_name(hardware: str, model: str, *, tensor_parallel_size: int) -> str:
    """Return the name of the file with a profile of our format."""
    return f"{hardware}-{model.lower().rstrip('/').rpartition('/')[2]}-tp{tensor_parallel_size}.csv"
