"""The size of the KV cache where a worker's settings do not fix it."""

from __future__ import annotations

import torch

from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.model_loading.checkpoint import CheckpointError

_TOKENS_ON_CPU = 32768
# CUDA's context, graphs, the libraries' workspaces.
_RESERVED_NBYTES = 2 << 30


def kv_tokens_that_fit(decoder: TextDecoder, max_num_batched_tokens: int, utilization: float, pool_nbytes: int) -> int:
    """Tokens whose KV fits beside weights, pool and a step's intermediate results; 32,768 on the CPU.

    Computed from the GPU's total memory, not from the free memory, so that all ranks of a worker get the same number.

    Args:
        utilization: part of the GPU's memory that this worker may use in all.
        pool_nbytes: the part of that which is the pool that decode workers map, bytes.

    Raises:
        CheckpointError: not even one fits.
    """
    config, device, itemsize = decoder.config, decoder.device, decoder.dtype.itemsize
    if device.type == "cpu":
        return _TOKENS_ON_CPU
    allowed = int(torch.cuda.get_device_properties(device).total_memory * utilization)
    weights = sum(each.nbytes for each in decoder.parameters())
    step = max_num_batched_tokens * _elements_a_token(config) * itemsize
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * itemsize
    left = allowed - weights - step - pool_nbytes - _RESERVED_NBYTES
    if left < a_token:
        raise CheckpointError(
            f"{weights / 2**30:.1f} GiB of weights, {step / 2**30:.1f} GiB for steps and a pool of "
            f"{pool_nbytes / 2**30:.1f} GiB leave nothing of {allowed / 2**30:.1f} GiB for keys and values: lower "
            "--max-num-batched-tokens or --cuda-ipc-pool-bytes, raise --gpu-memory-utilization, or spread the model "
            "with --tp"
        )
    return left // a_token


def _elements_a_token(config: TextConfig) -> int:
    """Elements in static buffers (embeddings, hidden states, deepstack, queries) and widest intermediate results."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    static = (2 + config.num_deepstack) * config.hidden_size + 2 * queries
    return static + 2 * config.hidden_size + 3 * config.intermediate_size + 2 * queries + 4 * keys
