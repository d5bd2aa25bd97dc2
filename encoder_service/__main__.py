"""`python -m encoder_service --model ... --port ...`"""

from __future__ import annotations

import sys

from embedding_transport.checkpoint import CheckpointError
from embedding_transport.errors import VitrineError
from encoder_service.app import serve
from encoder_service.config import EncoderConfig
from encoder_service.ranks import serve_ranks
from service_runtime.settings import run_service


def main() -> int:
    """Runs an encoder, or several with --dp; see run_service for the exit code."""
    failures = (CheckpointError, VitrineError)
    return run_service(EncoderConfig, lambda config: serve(config) if config.dp == 1 else serve_ranks(config), failures)


if __name__ == "__main__":
    sys.exit(main())
