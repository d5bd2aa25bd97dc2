"""Runs steps on a GPU as CUDA graphs: short steps whole, long ones piece by piece, with attention between the pieces.

Between them what decodes is attended by a graph of the layer, and prompts by kernels that are launched one by one.

A step runs in the graph of the smallest capture size that holds its tokens; padding tokens have slot -1. There are two
graphs of each size where they differ: for steps with media, which add deepstack embeddings, and for text alone.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

import torch

from vitrine_vlm.gpu_kernels.graph_capture import Capture, CudaGraphs, Work
from vitrine_vlm.gpu_kernels.packed_attention import Bounds, PackedAttention
from vitrine_vlm.llm_worker.engine.capture_sizes import capture_size, decode_capture_sizes, token_capture_sizes
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.gpu.step_attention import StepAttention
from vitrine_vlm.llm_worker.gpu.step_work import StepWork
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder

_log = logging.getLogger(__name__)
# Up to this many tokens launches take longer than the kernels, so attention is in the graph, too. Above, the kernels
# for long prompts are worth their launches.
_MAX_SHORT_STEP = 512
# A long step of prompts only is nearly done before these layers, half of all at most: there may be no next step yet,
# and what arrives up to then makes one.
_LAST_LAYERS = 4


class GpuRunner:
    """A `Runner` with CUDA graphs. Not thread-safe: one step at a time."""

    def __init__(
        self,
        decoder: TextDecoder,
        kv_cache: KvCache,
        buffer: InputEmbedBuffer,
        max_num_seqs: int,
        max_model_len: int,
        causal: PackedAttention,
        capture: Capture | None = None,
        max_short_step: int = _MAX_SHORT_STEP,
        on_progress: Callable[[int, int], None] = lambda num_done, num_all: None,
    ) -> None:
        """Captures all graphs, which takes a while.

        Args:
            causal: attention of long steps.
            capture: what makes a graph of a function; None for CUDA graphs.
            max_short_step: most tokens of a step that runs as one graph.
            on_progress: called with the number of sizes captured so far, and of all.
        """
        self._work = StepWork(decoder, kv_cache, buffer, max_num_seqs, max_model_len, max_short_step)
        self._kv_cache, self._causal, self._device = kv_cache, causal, decoder.device
        self._max_num_seqs = max_num_seqs
        # When the last step is nearly done; None for a short step of prompts only.
        self._nearly_done: torch.cuda.Event | None = None
        self._decode: dict[int, Work] = {}
        # By size, and by whether there are media.
        self._short: dict[int, dict[bool, Work]] = {}
        self._long: dict[int, dict[bool, list[Work]]] = {}
        # Attention of the sequences that decode in a long step, by layer.
        self._single_attention: list[Work] = []
        started = time.monotonic()
        capture = capture if capture is not None else CudaGraphs(decoder.device)
        with torch.inference_mode():
            self._capture_all(capture, len(buffer.slot_mapping_M), max_short_step, on_progress)
            if self._long:
                self._warm_up_attention()
        if isinstance(capture, CudaGraphs):
            gib, seconds = capture.nbytes / 2**30, time.monotonic() - started
            _log.info("%d CUDA graphs, %.2f GiB, %.1f s", capture.num_graphs, gib, seconds)

    def __call__(self, inputs: StepInputs) -> torch.Tensor:
        """Hidden states after the last norm, [T, C]; valid until the next step."""
        num_tokens, sequences, work = len(inputs.slot_mapping_T), inputs.sequences, self._work
        has_media = inputs.deepstack_NTC is not None
        decodes = any(each.length == 1 for each in sequences)
        self._nearly_done = None
        if num_tokens == len(sequences) and num_tokens <= self._max_num_seqs and not has_media:
            size = capture_size(self._decode, num_tokens)
            work.tables.write(sequences, work.decode_splits(size), None)
            self._begin_step()
            self._decode[size]()
        elif num_tokens <= max(self._short, default=0):
            size = capture_size(self._short, num_tokens)
            work.tables.write(sequences, *work.short_splits(size))
            if decodes:
                self._begin_step()
            self._short[size][has_media]()
        else:
            pieces = self._long[capture_size(self._long, num_tokens)][has_media]
            attention = StepAttention(
                sequences, work.tables, self._single_attention, work.long_splits, self._causal, self._device
            )
            if decodes:
                self._begin_step()
            num_first = max(len(pieces) - 1 - _LAST_LAYERS, len(pieces) // 2)
            pieces[0]()
            for layer, (piece, (k_cache, v_cache)) in enumerate(zip(pieces[1:], self._kv_cache.layers, strict=True)):
                attention(layer, work.q_MHD, k_cache, v_cache, work.kv_scales(layer), work.attended_MHD)
                piece()
                if not decodes and layer + 1 == num_first:
                    self._nearly_done = self._event()
        return work.hidden_MC[:num_tokens]

    def wait_until_nearly_done(self) -> bool:
        if self._nearly_done is None:
            return False
        self._nearly_done.synchronize()
        return True

    def _begin_step(self) -> None:
        """Marks a step that decodes as nearly done when it begins, so that the next one is prepared at once.

        What decodes makes a next step in any case, and the host needs long for it: it processes the last step's tokens
        and launches a long step piece by piece. What arrives during a step waits for one step more.
        """
        self._nearly_done = self._event()

    def _event(self) -> torch.cuda.Event | None:
        return torch.cuda.current_stream(self._device).record_event() if self._device.type == "cuda" else None

    def _capture_all(
        self, capture: Capture, max_tokens: int, max_short_step: int, on_progress: Callable[[int, int], None]
    ) -> None:
        # The largest first, so that smaller ones reuse its memory in the pool.
        tokens, batches = token_capture_sizes(max_tokens)[::-1], decode_capture_sizes(self._max_num_seqs)[::-1]
        num_all = len(tokens) + len(batches)
        for num_done, size in enumerate(tokens):
            on_progress(num_done, num_all)
            if size > max_short_step:
                self._long[size] = self._pieces(size, capture)
            else:
                works = {media: self._work.short_step(size, media=media) for media in (False, True)}
                self._short[size] = {media: capture(work) for media, work in works.items()}
        if self._long:
            layers = range(self._work.num_pieces - 1)
            self._single_attention = [capture(self._work.single_attention(layer)) for layer in layers]
        for num_done, size in enumerate(batches, len(tokens)):
            on_progress(num_done, num_all)
            self._decode[size] = capture(self._work.decode_step(size))
        on_progress(num_all, num_all)

    def _warm_up_attention(self) -> None:
        """Runs the attention of long steps once: some kernels are compiled at first use, which takes seconds."""
        length = min(self._long)
        q_THD, (k_cache_SKD, v_cache_SKD) = self._work.q_MHD[:length], self._kv_cache.layers[0]
        k_LKD, v_LKD = (q_THD.new_zeros((length, *each.shape[1:])) for each in (k_cache_SKD, v_cache_SKD))
        cumulated = torch.tensor([0, length], dtype=torch.int32, device=self._device)
        bounds = Bounds.of_self_attention(cumulated, length)
        self._causal(q_THD, k_LKD, v_LKD, bounds, scale=q_THD.shape[-1] ** -0.5, causal=True)

    def _pieces(self, size: int, capture: Capture) -> dict[bool, list[Work]]:
        """Captures the pieces of a long step, without and with media; those that do not differ are captured once."""
        work = self._work
        text = [capture(work.piece(index, size, media=False)) for index in range(work.num_pieces)]
        media = [
            capture(work.piece(index, size, media=True)) if work.has_media_variant(index) else text[index]
            for index in range(work.num_pieces)
        ]
        return {False: text, True: media}
