"""A process that holds a cluster of several simulated nodes and does `serve run` on it, for the tests beside it.

python -m tests.actors.node_cluster CONFIG, where CONFIG is a Serve config file. It reads commands from its standard
input, a line each, and answers each with a line: `remove PID` takes the node away whose raylet is that process. The
resource `head` is that of the node that stays.
"""

import sys
import threading

from ray.cluster_utils import Cluster
from ray.serve.scripts import cli

_HEAD_CPUS = 1
"""No stage of two ranks with a CPU each fits."""
_NODE_CPUS = 3
"""Room for one stage, and the scheduler beside it."""
_NUM_NODES = 3


def main() -> None:
    """Serve until interrupted."""
    head = {"num_cpus": _HEAD_CPUS, "resources": {"head": 1}, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=head)
    nodes = [cluster.add_node(num_cpus=_NODE_CPUS) for _ in range(_NUM_NODES)]

    def obey() -> None:
        for line in sys.stdin:
            command, pid = line.split()
            assert command == "remove", line
            (node,) = [node for node in nodes if node.all_processes["raylet"][0].process.pid == int(pid)]
            cluster.remove_node(node, allow_graceful=False)
            sys.stdout.write(f"removed {pid}\n")
            sys.stdout.flush()

    threading.Thread(target=obey, daemon=True).start()
    try:
        cli(["run", "--address", cluster.address, sys.argv[1]])
    finally:
        cluster.shutdown()


if __name__ == "__main__":
    main()
