"""Engine inputs that transformers' own processor, vision tower and position code compute."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import torch

from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan, SamplingParams, TokenOutput
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.engine.request_parts import SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.sample_models.reference import Media, Reference
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.types import EmbeddingRows


@dataclass
class Request:
    prompt: ExpandedPrompt
    rows: list[TensorRows]
    inputs: dict[str, torch.Tensor]

    @property
    def prefix(self) -> list[int]:
        first = min((span.start for span in self.prompt.spans), default=len(self.prompt.token_ids))
        return self.prompt.token_ids[:first]


def request_for(reference: Reference, text: str, media: list[Media]) -> Request:
    """The engine's inputs for this request; images come before videos among the items."""
    inputs = reference.inputs(text, media)
    ids = inputs["input_ids"][0].tolist()
    model = reference.model.model
    rows: list[TensorRows] = []
    with torch.inference_mode():
        for kind, pixels in (("image", "pixel_values"), ("video", "pixel_values_videos")):
            if pixels in inputs:
                out = model.visual(inputs[pixels], grid_thw=inputs[f"{kind}_grid_thw"], return_dict=True)
                packed = torch.cat([out.pooler_output, *(getattr(out, "deepstack_features", None) or [])], dim=1)
                sizes = (inputs[f"{kind}_grid_thw"].prod(-1) // model.visual.spatial_merge_size**2).tolist()
                rows.extend(TensorRows(part.clone()) for part in packed.split(sizes))
        positions = torch.arange(len(ids)).expand(3, -1)
        if media:
            names = ("image_grid_thw", "video_grid_thw", "second_per_grid_ts", "mm_token_type_ids")
            known = {name: inputs[name] for name in names if name in inputs}
            positions = model.get_rope_index(inputs["input_ids"], **known)[0][:, 0]
    spans = _spans(inputs["mm_token_type_ids"][0].tolist(), rows)
    prompt = ExpandedPrompt(ids, positions, int(positions.max()) + 1, tuple(spans))
    return Request(prompt, rows, inputs)


def _spans(kinds: list[int], rows: list[TensorRows]) -> Iterator[MediaSpan]:
    item, first_row, start = 0, 0, 0
    for kind, run in groupby(kinds):
        length = len(list(run))
        if kind:
            yield MediaSpan(item, start, length, first_row)
            first_row += length
            if first_row == rows[item].num_tokens:
                item, first_row = item + 1, 0
        start += length


@contextmanager
def running_engine(
    folder: Path,
    make_runner: MakeRunner = PlainRunner,
    on_gpu_lost: Callable[[], None] = lambda: None,
    start: bool = True,
    **config: int | str,
) -> Iterator[Engine]:
    decoder = build_decoder(open_checkpoint(str(folder)), torch.device("cpu"), torch.float32)
    limits = EngineConfig(**{"num_blocks": 64, "block_size": 8, "max_model_len": 512, **config})  # type: ignore[arg-type]
    engine = Engine(ForwardPass(decoder, limits, make_runner), limits, on_gpu_lost)
    if start:
        engine.start(Supervisor())
    try:
        yield engine
    finally:
        if start:
            engine.close()


def input_buffer(decoder: TextDecoder, max_num_batched_tokens: int) -> InputEmbedBuffer:
    """A token pool of 32 rows."""
    return InputEmbedBuffer(decoder, max_num_batched_tokens, 32, TokenPool(32, decoder.device))


def request_state(
    prompt: ExpandedPrompt, embeddings: Sequence[EmbeddingRows] = (), row: int = 0, max_tokens: int = 1
) -> RequestState:
    """A request whose whole prompt is known, of which nothing is computed, without blocks.

    Args:
        embeddings: of its media items, all of them or none.
    """
    request = RequestState(0, "request", [], SampledTokens(greedy(max_tokens)), pool_row=row)
    request.set_prompt(prompt)
    for item_index, each in enumerate(embeddings):
        request.receive_embeddings(item_index, each)
    return request


def unsent(items: list[int]) -> None:
    raise AssertionError(f"embeddings of {items} were requested, although they were announced and not lost")


def submit(engine: Engine, request: Request, sampling: SamplingParams) -> RequestHandle:
    """Submits prefix, prompt and embeddings at once."""
    handle = engine.submit("request", request.prefix, sampling, unsent)
    handle.set_prompt(request.prompt)
    for index, rows in enumerate(request.rows):
        handle.set_embeddings(index, rows)
    return handle


def greedy(max_tokens: int, logprobs: int | None = None) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, logprobs=logprobs)


async def collect(handle: RequestHandle) -> list[TokenOutput]:
    return [output async for output in handle]


async def tokens(handle: RequestHandle) -> list[int]:
    return [output.token_id for output in await collect(handle)]


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.005)


def is_idle(engine: Engine) -> bool:
    stats = engine.stats()
    return (stats.running, stats.waiting, stats.kv_blocks_used) == (0, 0, 0)


def submit_with_rows_at_hand(engine: Engine, request: Request, sampling: SamplingParams) -> RequestHandle:
    """Submits a request whose embeddings are set as often as they are requested."""

    def send_embeddings(items: list[int]) -> None:
        for item in items:
            handle.set_embeddings(item, TensorRows(request.rows[item]._rows_TW))

    handle = engine.submit("request", request.prefix, sampling, send_embeddings)
    handle.set_prompt(request.prompt, announced=())
    return handle
