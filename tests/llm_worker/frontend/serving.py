"""A small checkpoint's worker without its process: real engine and tokenizer, and a client to the test's encoder."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch

from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.llm_worker.engine.config import EngineConfig, KvCacheDtype
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.grammar_compiler import GrammarCompiler
from vitrine_vlm.llm_worker.families import build_decoder, prompt_config
from vitrine_vlm.llm_worker.generation.encoder_inputs import EncoderInputs
from vitrine_vlm.llm_worker.generation.generation import Generator
from vitrine_vlm.llm_worker.generation.layout_cache import LayoutCache
from vitrine_vlm.llm_worker.generation.request_inputs import PromptContext
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.prompt.config import PromptConfig
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import ModelIdentity

MAX_ITEMS = 4
NO_ENCODER = "127.0.0.1:9"


@dataclass(frozen=True)
class LocalWorker:
    served: ServedModel
    engine: Engine
    prompt_config: PromptConfig
    layout_cache: LayoutCache

    @property
    def generator(self) -> Generator:
        return self.served.generator

    async def until_idle(self) -> None:
        """Waits until no request holds anything in the engine."""
        async with asyncio.timeout(10):
            while (stats := self.engine.stats()).running or stats.waiting or stats.kv_blocks_used:
                await asyncio.sleep(0.01)


def identity(folder: Path) -> ModelIdentity:
    """The identity of an encoder with this checkpoint."""
    checkpoint = open_checkpoint(str(folder))
    config = checkpoint.config
    layers = tuple(config["vision_config"].get("deepstack_visual_indexes") or ())
    hidden_size = (config.get("text_config") or config)["hidden_size"]
    return ModelIdentity(checkpoint.model, checkpoint.revision, config["model_type"], hidden_size, layers, "float32")


@asynccontextmanager
async def serving(
    folder: Path,
    encoder: str = NO_ENCODER,
    with_tokenizer: bool = True,
    num_blocks: int = 64,
    kv_cache_dtype: KvCacheDtype = "auto",
) -> AsyncIterator[LocalWorker]:
    """
    Args:
        encoder: its address; the client is not even started for NO_ENCODER.
    """
    checkpoint = open_checkpoint(str(folder))
    decoder = build_decoder(checkpoint, torch.device("cpu"), torch.float32)
    limits = EngineConfig(num_blocks=num_blocks, max_model_len=512, kv_cache_dtype=kv_cache_dtype)
    engine = Engine(ForwardPass(decoder, limits), limits)
    engine.start(Supervisor())
    encoders = EncoderClient([encoder], identity(folder), transport="grpc", shm_folder=folder)
    if encoder != NO_ENCODER:
        await encoders.start()
    tokenizer = PromptTokenizer(checkpoint) if with_tokenizer else None
    config = prompt_config(checkpoint)
    layout_cache = LayoutCache()
    make_inputs = partial(EncoderInputs, encoders, layout_cache)
    defaults = SamplingDefaults.from_checkpoint(checkpoint)
    grammars = GrammarCompiler(tokenizer.for_grammars(engine.vocab_size, defaults.eos_token_ids)) if tokenizer else None
    generator = Generator(PromptContext(engine, config, tokenizer, grammars), make_inputs, MAX_ITEMS)
    try:
        served = ServedModel(checkpoint.model, generator, defaults, str(folder))
        yield LocalWorker(served, engine, config, layout_cache)
    finally:
        await encoders.close()
        await asyncio.to_thread(engine.close)
        if grammars is not None:
            grammars.close()
