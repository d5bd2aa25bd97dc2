"""`python -m llm_worker --model ... --encoders host:port,...`"""

from __future__ import annotations

import sys

from embedding_transport.service_settings import run_service
from llm_worker.app import serve
from llm_worker.config import LlmConfig


def main() -> int:
    """Runs an LLM worker; see run_service for the exit code."""
    return run_service(LlmConfig, serve)


if __name__ == "__main__":
    sys.exit(main())
