"""`vitrine-encoder --model ... --port ...`, or `python -m vitrine_vlm.encoder_service`."""

from __future__ import annotations

import os
import sys

import vitrine_vlm.service_runtime.grpc_log  # noqa: F401
from vitrine_vlm.encoder_service.app import serve
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.ranks import serve_ranks
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.model_loading.checkpoint import CheckpointError
from vitrine_vlm.service_runtime.settings import run_service


def main() -> int:
    """Runs an encoder, or several with --dp; see run_service for the exit code."""
    # CUDA reads it where processes share a GPU by its Multi-Process Service (docs/operations.md): the kernels of a
    # worker on the same GPU go first, as those between tokens are short.
    os.environ.setdefault("CUDA_MPS_CLIENT_PRIORITY", "1")
    failures = (CheckpointError, VitrineError)
    return run_service(EncoderConfig, lambda config: serve(config) if config.dp == 1 else serve_ranks(config), failures)


if __name__ == "__main__":
    sys.exit(main())
