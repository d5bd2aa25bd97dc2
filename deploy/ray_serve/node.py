"""The node that a replica runs on."""

from __future__ import annotations

import socket
from typing import Any

import ray


def node_host() -> str:
    """Returns the address of this node within the cluster."""
    return str(_node()["NodeManagerAddress"])


def num_gpus_of_node() -> int:
    return int(_node()["Resources"].get("GPU", 0))


def _node() -> dict[str, Any]:
    node_id = ray.get_runtime_context().get_node_id()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    return next(node for node in nodes if node["NodeID"] == node_id)


def free_ports(host: str, count: int) -> list[int]:
    """Returns free ports. If one is used before the service binds it, the service ends and Ray Serve retries."""
    sockets = [socket.create_server((host, 0)) for _ in range(count)]
    ports = [int(each.getsockname()[1]) for each in sockets]
    for each in sockets:
        each.close()
    return ports
