"""The memory of the KV cache: its dtype, and its size where a worker's settings do not fix it."""

from __future__ import annotations

import torch

from vitrine_vlm.gpu_kernels.fp8_weight import FP8
from vitrine_vlm.llm_worker.engine.config import KvCacheDtype
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.quantization import FIRST_WITH_FP8
from vitrine_vlm.model_loading.checkpoint import CheckpointError

_TOKENS_ON_CPU = 32768
# CUDA's context, graphs, the libraries' workspaces.
_RESERVED_NBYTES = 2 << 30


def kv_dtype(decoder: TextDecoder, kv_cache_dtype: KvCacheDtype) -> torch.dtype:
    """The element type of the decoder's keys and values in the cache.

    Raises:
        CheckpointError: the GPU cannot convert from and to FP8.
    """
    if kv_cache_dtype == "auto":
        return decoder.dtype
    if decoder.device.type == "cuda":
        capability = torch.cuda.get_device_capability(decoder.device)
        if capability < FIRST_WITH_FP8:
            raise CheckpointError(
                f"--kv-cache-dtype fp8 needs a GPU of compute capability {_version(FIRST_WITH_FP8)} or more, this one "
                f"has {_version(capability)}: use auto"
            )
    return FP8


def kv_tokens_that_fit(
    decoder: TextDecoder,
    kv_cache_dtype: KvCacheDtype,
    max_num_batched_tokens: int,
    utilization: float,
    pool_nbytes: int,
) -> int:
    """Tokens whose KV fits beside weights, pool and a step's intermediate results; 32,768 on the CPU.

    Computed from the GPU's total memory, not from the free memory, so that all ranks of a worker get the same number.

    Args:
        utilization: part of the GPU's memory that this worker may use in all.
        pool_nbytes: the part of that which is the pool that decode workers map, bytes.

    Raises:
        CheckpointError: not even one fits; see `kv_dtype`.
    """
    config, device = decoder.config, decoder.device
    if device.type == "cpu":
        return _TOKENS_ON_CPU
    allowed = int(torch.cuda.get_device_properties(device).total_memory * utilization)
    weights = sum(each.nbytes for each in decoder.parameters())
    step = max_num_batched_tokens * _elements_a_token(config) * decoder.dtype.itemsize
    kv_itemsize = kv_dtype(decoder, kv_cache_dtype).itemsize
    a_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * kv_itemsize
    left = allowed - weights - step - pool_nbytes - _RESERVED_NBYTES
    if left < a_token:
        raise CheckpointError(
            f"{weights / 2**30:.1f} GiB of weights, {step / 2**30:.1f} GiB for steps and a pool of "
            f"{pool_nbytes / 2**30:.1f} GiB leave nothing of {allowed / 2**30:.1f} GiB for keys and values: lower "
            "--max-num-batched-tokens or --cuda-ipc-pool-bytes, raise --gpu-memory-utilization, or spread the model "
            "with --tp"
        )
    return left // a_token


def _version(capability: tuple[int, int]) -> str:
    return ".".join(map(str, capability))


def _elements_a_token(config: TextConfig) -> int:
    """Elements in static buffers (embeddings, hidden states, deepstack, queries) and widest intermediate results."""
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    static = (2 + config.num_deepstack) * config.hidden_size + 2 * queries
    return static + 2 * config.hidden_size + 3 * config.intermediate_size + 2 * queries + 4 * keys
