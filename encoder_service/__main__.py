"""`python -m encoder_service --model ... --port ...`"""

from __future__ import annotations

import sys

from embedding_transport.service_settings import run_service
from encoder_service.app import serve
from encoder_service.config import EncoderConfig


def main() -> int:
    """Runs an encoder; see run_service for the exit code."""
    return run_service(EncoderConfig, serve)


if __name__ == "__main__":
    sys.exit(main())
