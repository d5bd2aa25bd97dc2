"""`vitrine-llm --model ... --encoders host:port,...`, or `python -m vitrine_vlm.llm_worker`."""

from __future__ import annotations

import sys

import torch.distributed as dist

import vitrine_vlm.service_runtime.grpc_log  # noqa: F401
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.llm_worker.app import serve
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.model_loading.checkpoint import CheckpointError
from vitrine_vlm.service_runtime.lifecycle import exit_now
from vitrine_vlm.service_runtime.settings import run_service


def main() -> int:
    """Runs an LLM worker; `run_service` documents the exit code."""
    status = run_service(LlmConfig, serve, (CheckpointError, VitrineError))
    if dist.is_initialized():
        # Without cleaning up: NCCL would wait for ranks that have ended, and for graphs that captured its collectives.
        exit_now(status)
    return status


if __name__ == "__main__":
    sys.exit(main())
