"""The whole application on a Ray of its own, all on loopback, and what a test wants to know about it."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
import tempfile
import time
import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.serve._private.common import ReplicaState
from ray.serve.exceptions import DeploymentUnavailableError

from vitrine_vlm.deploy.ray_serve.application import build
from vitrine_vlm.deploy.ray_serve.config import ServeArguments

APPLICATION = "vitrine"
# Ray takes 127.0.0.1 for a name of this host and listens on another address; this one is loopback, too.
HOST = "127.0.0.2"
_HEALTH = "grpc_health.v1.health_pb2_grpc.add_HealthServicer_to_server"
_SERVICER = "vitrine_vlm.protos.encoder.v1.encoder_pb2_grpc.add_EncoderServicer_to_server"
_MARK = "VITRINE_TEST_RUN"
_GONE_TIMEOUT_S = 30.0
# For Ray Serve: on a busy machine a proxy does not start within the 5 s after which it is killed and restarted.
_PROXY_TIMEOUT_VARIABLE, _PROXY_TIMEOUT_S = "RAY_SERVE_PROXY_READY_CHECK_TIMEOUT_S", "50"


@dataclass(frozen=True)
class Running:
    """base_url, grpc_address: of Ray Serve's proxies; mark: in the environment of every process; logs: Ray Serve's."""

    base_url: str
    grpc_address: str
    mark: str
    logs: Path

    def num_running(self, deployment: str) -> int:
        """Replicas that serve."""
        states = serve.status().applications[APPLICATION].deployments[deployment].replica_states
        return states.get(ReplicaState.RUNNING, 0)

    def encoder_addresses(self) -> list[str]:
        """Of the encoders that serve and whose process lives."""
        handle = serve.get_deployment_handle("Encoder", APPLICATION)
        try:
            answers = handle.broadcast("address").results(return_exceptions=True)
        except DeploymentUnavailableError:  # none serves
            return []
        return [answer for answer in answers if isinstance(answer, str)]

    def pid_of_encoder(self, address: str) -> int:
        """The process that listens there, and not one on the way from the replica to it."""
        port = address.rpartition(":")[2]
        for pid, environment in _processes(self.mark).items():
            command = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
            if f"VITRINE_ENCODER_PORT={port}".encode() in environment and b"vitrine_vlm.encoder_service" in command:
                return pid
        raise LookupError(f"no encoder listens on {address}")


@contextlib.contextmanager
def running_application(arguments: dict[str, Any]) -> Iterator[Running]:
    """Leaves no process behind, or fails."""
    folder = tempfile.mkdtemp(prefix="vr-")  # a short name: Ray puts sockets deep below it
    mark = os.environ[_MARK] = uuid.uuid4().hex
    os.environ[_PROXY_TIMEOUT_VARIABLE] = _PROXY_TIMEOUT_S
    http_port, grpc_port = _free_port(), _free_port()
    try:
        ray.init(
            num_cpus=4,
            include_dashboard=False,
            object_store_memory=100 << 20,
            log_to_driver=False,
            _node_ip_address=HOST,
            _temp_dir=folder,
        )
        serve.start(
            proxy_location="HeadOnly",
            http_options={"host": HOST, "port": http_port},
            grpc_options={"port": grpc_port, "grpc_servicer_functions": [_SERVICER, _HEALTH]},
        )
        logs = Path(folder, "session_latest", "logs", "serve")
        serve.run(build(ServeArguments.model_validate(arguments)), name=APPLICATION)
        yield Running(f"http://{HOST}:{http_port}", f"{HOST}:{grpc_port}", mark, logs)
    finally:
        serve.shutdown()
        ray.shutdown()
        del os.environ[_MARK], os.environ[_PROXY_TIMEOUT_VARIABLE]
        shutil.rmtree(folder, ignore_errors=True)
    deadline = time.monotonic() + _GONE_TIMEOUT_S
    while left := _processes(mark):
        assert time.monotonic() < deadline, f"processes outlived the application: {sorted(left)}"
        time.sleep(0.2)


def _processes(mark: str) -> dict[int, list[bytes]]:
    """Processes of this run and their environments; this one is older than its mark."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            environment = (folder / "environ").read_bytes().split(b"\0")
            if f"{_MARK}={mark}".encode() in environment:
                found[int(folder.name)] = environment
    return found


def _free_port() -> int:
    with socket.create_server((HOST, 0)) as free:
        return int(free.getsockname()[1])
