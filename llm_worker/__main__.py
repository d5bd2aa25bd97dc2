"""`vitrine-llm --model ... --encoders host:port,...`, or `python -m vitrine_vlm.llm_worker`."""

from __future__ import annotations

import logging
import os
import sys

import torch.distributed as dist

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.app import serve
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.model_loading.checkpoint import CheckpointError
from vitrine_vlm.service_runtime.settings import run_service


def main() -> int:
    """Runs an LLM worker; see run_service for the exit code."""
    return run_service(LlmConfig, serve, (CheckpointError, VitrineError))


if __name__ == "__main__":
    status = main()
    if dist.is_initialized():
        # At once: NCCL's own end waits for ranks that are gone, and for graphs that hold its sums.
        logging.shutdown()
        os._exit(status)
    sys.exit(status)
