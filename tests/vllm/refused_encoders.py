"""Run by the Python that has vLLM: starts it once for each encoder, which it should refuse.

    python refused_encoders.py CHECKPOINT_FOLDER ADDRESS...

Prints a JSON object: the address, and the error with all of its causes; empty where vLLM has started.
"""

from __future__ import annotations

import json
import sys

from vllm import LLM
from vllm.config import ECTransferConfig
from vllm.distributed import cleanup_dist_env_and_memory
from vllm.distributed.ec_transfer.ec_transfer_state import ensure_ec_transfer_shutdown


def error_at_start(folder: str, address: str) -> str:
    config = ECTransferConfig(
        ec_connector="VitrineConnector",
        ec_connector_module_path="vitrine_vlm.vllm_connector.connector",
        ec_role="ec_consumer",
        ec_connector_extra_config={"encoders": address},
    )
    error: BaseException | None = None
    try:
        LLM(
            folder,
            dtype="float32",
            max_model_len=2048,
            enforce_eager=True,
            distributed_executor_backend="uni",
            ec_transfer_config=config,
        )
    except Exception as caught:
        error = caught
    finally:
        ensure_ec_transfer_shutdown()  # else the next start in this process would use this one's connector
        cleanup_dist_env_and_memory()
    messages = []
    while error is not None:
        messages.append(f"{type(error).__name__}: {error}")
        error = error.__cause__ or error.__context__
    return "; ".join(messages)


if __name__ == "__main__":
    _, folder, *addresses = sys.argv
    print(json.dumps({address: error_at_start(folder, address) for address in addresses}))
