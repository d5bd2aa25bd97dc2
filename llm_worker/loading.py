"""Prepares one rank of a worker: chooses its device, loads its part of the model, chooses a runner."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

from vitrine_vlm.dtypes import DTYPES
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.grammar_compiler import GrammarCompiler
from vitrine_vlm.llm_worker.engine.kv_memory import kv_tokens_that_fit
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.llm_worker.families import build_decoder, family_of
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.fp8_linear import Fp8Linear
from vitrine_vlm.llm_worker.models.rank_group import OneRank, RankGroup
from vitrine_vlm.llm_worker.models.weights import stored_dtype
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.model_loading.loading import ProgressLog, choose_device, choose_dtype
from vitrine_vlm.types import ModelIdentity

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class LoadedModel:
    """The language half of a checkpoint, ready to run."""

    identity: ModelIdentity
    decoder: TextDecoder
    tokenizer: PromptTokenizer | None
    prompt_config: PromptConfig
    defaults: SamplingDefaults


def rank_device(config: LlmConfig, rank: int) -> torch.device:
    """The device of this rank: the visible GPU whose index is the rank, or the CPU.

    Raises:
        CheckpointError: a GPU is asked for and there is none, or none for this rank.
    """
    device = choose_device(config.device)
    if device.type == "cpu" or config.tp == 1:
        return device
    num_visible = torch.cuda.device_count()
    if rank >= num_visible:
        raise CheckpointError(f"--tp {config.tp} needs as many GPUs, visible are {num_visible}")
    return torch.device("cuda", rank)


def make_grammar_compiler(model: LoadedModel) -> GrammarCompiler | None:
    """None for a model without a tokenizer. Takes a second for a large vocabulary, in which no other thread runs."""
    if model.tokenizer is None:
        return None
    vocab_size = model.decoder.config.vocab_size
    return GrammarCompiler(model.tokenizer.for_grammars(vocab_size, model.defaults.eos_token_ids))


def load_model(
    config: LlmConfig,
    must_stop: Callable[[], bool],
    show: Callable[[str, float], None] = lambda stage, part: None,
    group: RankGroup | None = None,
) -> LoadedModel:
    """Finds the checkpoint and loads its decoder, logging the progress. Blocking.

    Args:
        must_stop: once it returns True, loading ends with LoadingStopped.
        show: called with a stage of the start ("weights") and the part of it that is done.
        group: the ranks that share the model, of which this one loads its part; None for one rank that loads all.

    Raises:
        CheckpointError: no such checkpoint, or one that this worker cannot serve.
    """
    _log.info("opening checkpoint %s", config.model)
    checkpoint = open_checkpoint(config.model, config.revision, config.served_model_name, config.load_format)
    family = family_of(checkpoint)
    tokenizer = None
    if not config.skip_tokenizer_init:
        tokenizer = PromptTokenizer(checkpoint, config.allow_special_tokens_in_text, config.trust_request_chat_template)
    group = group if group is not None else OneRank()
    # While the weights are read. What rank 0 serves is compared with others, and its ranks read the same files.
    revision = checkpoint.start_hashing() if group.rank == 0 else lambda: ""
    device = rank_device(config, group.rank)
    dtype_name = choose_dtype(config.dtype, device, stored_dtype(checkpoint))
    progress = ProgressLog("loading language weights", must_stop, partial(show, "weights"))
    decoder = build_decoder(checkpoint, device, DTYPES[dtype_name], progress, group, config.quantization)
    vision = checkpoint.config["vision_config"]
    identity = ModelIdentity(
        model=checkpoint.model,
        revision=revision(),
        model_type=decoder.config.model_type,
        out_hidden_size=decoder.config.hidden_size,
        deepstack_visual_indexes=tuple(vision.get("deepstack_visual_indexes") or ()),
        dtype=dtype_name,
    )
    if num_in_fp8 := sum(isinstance(each, Fp8Linear) for each in decoder.modules()):
        _log.info("%d products of the decoder have their weights in FP8", num_in_fp8)
    _log.info("loaded %s, revision %s, %s on %s", identity.model, identity.revision[:12], dtype_name, device)
    return LoadedModel(
        identity,
        decoder,
        tokenizer,
        family.prompt_config(checkpoint),
        SamplingDefaults.from_checkpoint(checkpoint),
    )


def engine_config(config: LlmConfig, decoder: TextDecoder) -> EngineConfig:
    """The engine's limits, with as many KV blocks as the settings or the memory allow.

    Raises:
        CheckpointError: see `kv_tokens_that_fit`.
    """
    fit = 0
    if config.kv_cache_tokens is None:
        fit = kv_tokens_that_fit(
            decoder,
            config.kv_cache_dtype,
            config.max_num_batched_tokens,
            config.gpu_memory_utilization,
            config.pool_gpu_nbytes,
        )
    limits = config.engine_config(decoder.config.max_position_embeddings, fit)
    _log.info("keys and values of %d tokens are kept", limits.num_blocks * limits.block_size)
    return limits


def choose_runner(
    decoder: TextDecoder, config: EngineConfig, on_progress: Callable[[int, int], None] = lambda num_done, num_all: None
) -> MakeRunner:
    """Returns the runner with fused kernels and CUDA graphs for a GPU, the plain one otherwise.

    Args:
        on_progress: called with the number of graphs captured so far, and of all.
    """
    if decoder.device.type != "cuda":
        return PlainRunner
    from vitrine_vlm.gpu_kernels.packed_attention import installed_attention
    from vitrine_vlm.llm_worker.gpu.gpu_runner import (
        GpuRunner,  # needs Triton, which comes with torch's CUDA builds only
    )

    return partial(
        GpuRunner,
        max_num_seqs=config.max_num_seqs,
        max_model_len=config.max_model_len,
        causal=installed_attention(decoder.dtype),
        # The host decides which experts run, which cannot be captured.
        capture=None if decoder.config.moe is None else lambda work: work,
        on_progress=on_progress,
    )
