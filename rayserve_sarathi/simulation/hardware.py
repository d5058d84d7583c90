"""Named hardware: what its data sheet says, and how much of that programs reach.

Peaks are of the dense matrix units at the type that models run in (bfloat16 on GPUs, float32 on CPUs). The efficiencies
are round figures, the same for all GPUs, so that a machine that nobody has measured can be predicted: about what the
single operators in Vidur's public profiles of A100, A40 and H100 reach. Where a profile of the machine itself exists,
`profile_times` is closer.
"""

from dataclasses import dataclass

from rayserve_sarathi.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class Hardware:
    """A device, its neighbours in the node, and the way to other nodes.

    Args:
        name: What commands call it.
        peak_flops: FLOP/s of the matrix units.
        memory_bandwidth: Bytes/s.
        memory_bytes: Of a device.
        itemsize: Bytes of a weight or an element of the KV cache.
        devices_per_node: How many share a node.
        link_bandwidth: Bytes/s that a device sends to its neighbour while it receives as much: NVLink where there is.
        devices_per_link_group: Devices that are all connected so. A collective of more of them takes
            `slow_link_bandwidth` as it is as fast as its slowest link.
        slow_link_bandwidth: Bytes/s between other devices of the node: PCIe.
        network_bandwidth: Bytes/s between nodes.
        tile_tokens: A matrix product computes whole tiles of so many rows; the last is padded.
        launch_s: Least time of an operator.
        collective_latency_s: Least time of an all-reduce.
        link_latency_s: Least time of a transfer in the node; `network_latency_s` between nodes.
        host_step_s: CPU time of a step, whatever is in it; `host_request_s` more for each request. An assumption of
            about a millisecond for scheduling, preparing, transport and bookkeeping, not a data sheet's.
        compute_efficiency: Share of `peak_flops` that large matrix products reach.
        memory_efficiency: Share of `memory_bandwidth` that products of few rows, which read weights, reach.
        attention_compute_efficiency: Share of `peak_flops` in attention of a chunk; a tenth for short chunks without
            context, and more than half for long ones with much of it, have both been measured.
        attention_memory_efficiency: Share of `memory_bandwidth` in attention of decodes, which reads the KV cache.
        link_efficiency: Share of a link's bandwidth.
    """

    name: str
    peak_flops: float
    memory_bandwidth: float
    memory_bytes: int
    itemsize: int = 2
    devices_per_node: int = 8
    link_bandwidth: float
    devices_per_link_group: int
    slow_link_bandwidth: float
    network_bandwidth: float
    tile_tokens: int = 128
    launch_s: float = 3e-6
    collective_latency_s: float = 40e-6
    link_latency_s: float = 10e-6
    network_latency_s: float = 30e-6
    host_step_s: float = 1e-3
    host_request_s: float = 10e-6
    compute_efficiency: float = 0.7
    memory_efficiency: float = 0.75
    attention_compute_efficiency: float = 0.35
    attention_memory_efficiency: float = 0.7
    link_efficiency: float = 0.75

    def collective_bandwidth(self, num_devices: int) -> float:
        """Return the bytes/s of the slowest link between so many devices, which are in one node where they fit."""
        if num_devices > self.devices_per_node:
            return self.network_bandwidth
        return self.link_bandwidth if num_devices <= self.devices_per_link_group else self.slow_link_bandwidth


_PCIE_4 = 32e9  # 16 lanes of 16 GT/s, a direction
_PCIE_5 = 64e9
_GBIT = 1e9 / 8

_A100 = Hardware(
    name="a100",
    peak_flops=312e12,
    memory_bandwidth=2039e9,
    memory_bytes=80 * 10**9,
    devices_per_node=4,
    link_bandwidth=300e9,
    devices_per_link_group=2,
    slow_link_bandwidth=_PCIE_4,
    network_bandwidth=100 * _GBIT,
)
"""NVIDIA A100 80GB data sheet (2021), with the SXM card's bandwidth: 312 TFLOP/s bfloat16, 2,039 GB/s, 600 GB/s of
NVLink in both directions. The node is the paper's (section 5): four cards, NVLink between pairs, 100 Gbit/s Ethernet.
"""

_A100_DGX = Hardware(
    name="a100-dgx",
    peak_flops=312e12,
    memory_bandwidth=2039e9,
    memory_bytes=80 * 10**9,
    link_bandwidth=300e9,
    devices_per_link_group=8,
    slow_link_bandwidth=_PCIE_4,
    network_bandwidth=200 * _GBIT,
)
"""The same card in a DGX A100 (data sheet, 2021): eight behind NVSwitch, a 200 Gbit/s adapter for each."""

_A40 = Hardware(
    name="a40",
    peak_flops=149.7e12,
    memory_bandwidth=696e9,
    memory_bytes=48 * 10**9,
    link_bandwidth=56.25e9,
    devices_per_link_group=1,
    slow_link_bandwidth=_PCIE_4,
    network_bandwidth=100 * _GBIT,
    link_efficiency=0.17,
)
"""NVIDIA A40 data sheet (2022): 149.7 TFLOP/s bfloat16, 696 GB/s, NVLink of 112.5 GB/s in both directions to one
neighbour by a bridge that is bought apart. Eight in a node, as in the paper, and without bridges: in Vidur's profiles
of such a node all-reduces and transfers, of two cards too, move 4 to 6 GB/s, a sixth of what PCIe of 16 lanes has."""

_H100 = Hardware(
    name="h100",
    peak_flops=989e12,
    memory_bandwidth=3350e9,
    memory_bytes=80 * 10**9,
    link_bandwidth=450e9,
    devices_per_link_group=8,
    slow_link_bandwidth=_PCIE_5,
    network_bandwidth=400 * _GBIT,
)
"""NVIDIA H100 SXM data sheet (2023): 989 TFLOP/s bfloat16 dense, 3.35 TB/s, 900 GB/s of NVLink in both directions.
Eight behind NVSwitch, a 400 Gbit/s adapter for each."""

_H200 = Hardware(
    name="h200",
    peak_flops=989e12,
    memory_bandwidth=4800e9,
    memory_bytes=141 * 10**9,
    link_bandwidth=450e9,
    devices_per_link_group=8,
    slow_link_bandwidth=_PCIE_5,
    network_bandwidth=400 * _GBIT,
)
"""NVIDIA H200 SXM data sheet (2024): as the H100, with 4.8 TB/s and 141 GB."""

_CPU = Hardware(
    name="cpu",
    peak_flops=172e9,
    memory_bandwidth=33e9,
    memory_bytes=8 * 10**9,
    itemsize=4,
    devices_per_node=1,
    link_bandwidth=33e9,
    devices_per_link_group=1,
    slow_link_bandwidth=33e9,
    network_bandwidth=10 * _GBIT,
    tile_tokens=1,
    host_step_s=1e-3,
    link_latency_s=100e-6,
    network_latency_s=200e-6,
    compute_efficiency=0.8,
    memory_efficiency=0.9,
    attention_compute_efficiency=0.25,
)
"""Two cores of a server as clouds rent them: no data sheet, but what float32 products of large matrices (172 GFLOP/s)
and copies of large arrays (33 GB/s) reached on one."""

HARDWARE = {each.name: each for each in (_A100, _A100_DGX, _A40, _H100, _H200, _CPU)}


def find_hardware(name: str) -> Hardware:
    """Return a named device.

    Raises:
        ConfigError: There is none of that name; the message lists those that there are.
    """
    if name not in HARDWARE:
        raise ConfigError(f"unknown hardware {name!r}; use one of {sorted(HARDWARE)}")
    return HARDWARE[name]
