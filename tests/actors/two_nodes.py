"""A Ray cluster of two nodes on this machine, run as a program: it ends when its standard input does.

Arguments: the dashboard's port, and the CPUs of each node. Writes the cluster's address.
"""

import sys

from ray.cluster_utils import Cluster


def main() -> None:
    dashboard_port, num_cpus = int(sys.argv[1]), int(sys.argv[2])
    size = {"num_cpus": num_cpus, "object_store_memory": 200 * 1024 * 1024}
    cluster = Cluster(
        initialize_head=True, head_node_args={**size, "include_dashboard": True, "dashboard_port": dashboard_port}
    )
    cluster.add_node(**size)
    sys.stdout.write(f"{cluster.address}\n")
    sys.stdout.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
