"""The cluster's nodes, as the placement logic wants them."""

from typing import Any

import ray

from rayserve_sarathi.placement import Node
from rayserve_sarathi.registry import import_object


def cluster_nodes() -> list[Node]:
    """Return the nodes that are alive, with what they have and what of it is free."""
    nodes: list[dict[str, Any]] = [node for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]  # Ray's annotation is missing
    # Ray's public API has the free resources of the whole cluster only.
    available: dict[str, dict[str, float]] = import_object("ray._private.state:available_resources_per_node")()
    addresses = [node["NodeManagerAddress"] for node in nodes]
    return [
        Node(
            name=address if addresses.count(address) == 1 else f"{address} ({node['NodeID'][:8]})",
            node_id=node["NodeID"],
            total=node["Resources"],
            available=available.get(node["NodeID"], {}),
        )
        for node, address in zip(nodes, addresses, strict=True)
    ]
