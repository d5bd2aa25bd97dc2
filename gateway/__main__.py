"""`vitrine-gateway --servers host:port,... --encoders host:port,...`, or `python -m vitrine_vlm.gateway`."""

from __future__ import annotations

import sys

import vitrine_vlm.service_runtime.grpc_log  # noqa: F401
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.gateway.app import serve
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.service_runtime.settings import run_service


def main() -> int:
    """Runs a gateway; `run_service` documents the exit code."""
    return run_service(GatewayConfig, serve, (VitrineError,))


if __name__ == "__main__":
    sys.exit(main())
