"""The process of a rank above 0 of a tensor parallel worker: `python -m ...tp_worker RANK FILE FD`.

Rank 0 starts it with its own settings in the environment, and sends it each step. It ends with rank 0.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path

import torch

from vitrine_vlm.embedding_transport.pools.pool import PoolMapping
from vitrine_vlm.embedding_transport.pools.pool_source import map_source
from vitrine_vlm.embedding_transport.receiving.received_rows import copy_rows
from vitrine_vlm.errors import TransportUnavailable
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.input_embed_buffer import PreparedStep
from vitrine_vlm.llm_worker.engine.prompt_logprobs import ScoredTokens
from vitrine_vlm.llm_worker.loading import choose_runner, engine_config, load_model, rank_device
from vitrine_vlm.llm_worker.tensor_parallel.broadcast import broadcast_embeddings
from vitrine_vlm.llm_worker.tensor_parallel.channel import Channel, ChannelClosed, FrameKind
from vitrine_vlm.llm_worker.tensor_parallel.group import TorchGroup
from vitrine_vlm.llm_worker.tensor_parallel.shared_pools import NUMBER
from vitrine_vlm.llm_worker.tensor_parallel.step_message import PoolLanding, StepDeserializer, StepMessage
from vitrine_vlm.model_loading.checkpoint import CheckpointError
from vitrine_vlm.service_runtime.logs import start_logging
from vitrine_vlm.service_runtime.memory import freeze_gc

_log = logging.getLogger(__name__)


class TpWorker:
    """Runs the steps that rank 0 sends, until rank 0 ends."""

    def __init__(self, config: LlmConfig, group: TorchGroup, channel: Channel) -> None:
        model = load_model(config, lambda: False, group=group)
        decoder = model.decoder
        limits = engine_config(config, decoder)
        channel.send(FrameKind.LOADED, NUMBER.pack(limits.num_blocks))
        self._forward_pass = ForwardPass(decoder, limits, choose_runner(decoder, limits))
        self._group, self._channel = group, channel
        self._row_width = decoder.config.hidden_size * (1 + decoder.config.num_deepstack)
        self._pools: dict[int, PoolMapping] = {}

    @torch.inference_mode()
    def run(self) -> None:
        """Executes rank 0's messages.

        Raises:
            ChannelClosed: rank 0 has ended.
        """
        deserializer = StepDeserializer(self._forward_pass.kv_cache.block_size)
        while True:
            kind, payload = self._channel.receive()
            if kind == FrameKind.STEP:
                self._run_step(deserializer.deserialize_step(payload))
            elif kind == FrameKind.MAP:
                self._map(payload)
            elif kind == FrameKind.UNMAP:
                self._pools.pop(NUMBER.unpack(payload)[0], None)
            else:
                raise ValueError(f"rank 0 sent a frame of kind {kind.name}")

    def _run_step(self, step: StepMessage) -> None:
        buffer = self._forward_pass.buffer
        buffer.stage(step.integers_5T, step.sampled_tokens)
        inputs = buffer.copy_to_device(step.integers_5T.shape[1], step.sequences, step.with_deepstack)
        for landing in step.landings:
            self._land(landing)
        broadcast_embeddings(self._group, buffer, step.broadcast)
        # The logits are needed on rank 0 only, but are gathered from all ranks.
        scored = [ScoredTokens(start, stop, [0] * (stop - start), 0) for start, stop in step.scored]
        self._forward_pass.run(PreparedStep(inputs, step.sampled_tokens, scored=scored))

    def _land(self, landing: PoolLanding) -> None:
        """Lands embeddings from a pool; rank 0 checks their lease after the step."""
        buffer = self._forward_pass.buffer
        shape = (landing.num_rows, self._row_width)
        rows_TW = self._pools[landing.pool].rows(landing.offset, shape, buffer.embeds_MC.dtype)
        copy_rows(rows_TW, *buffer.places(landing.start, landing.stop), landing.first_row)

    def _map(self, payload: bytes) -> None:
        number, error = NUMBER.unpack_from(payload)[0], ""
        try:
            self._pools[number] = map_source(json.loads(payload[NUMBER.size :]), self._forward_pass.decoder.device)
        except TransportUnavailable as reason:
            error = str(reason)
        self._channel.send(FrameKind.MAPPED, error.encode())


def main() -> int:
    """Runs the rank; returns 0 when rank 0 has ended, 1 where this rank has failed."""
    rank, store_file, fd = sys.argv[1:]
    # Ctrl-C reaches this process, too, but rank 0 decides when the worker ends.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    config = LlmConfig.from_command_line([])
    start_logging(config.log_level, config.log_format)
    channel = Channel(socket.socket(fileno=int(fd)))
    try:
        device = rank_device(config, int(rank))
        if device.type == "cuda":
            torch.cuda.set_device(device)
        group = TorchGroup.join(int(rank), config.tp, device, Path(store_file))
        worker = TpWorker(config, group, channel)
        freeze_gc()
        worker.run()
    except ChannelClosed:
        return 0
    except CheckpointError as error:
        _log.error("%s", error)
    except Exception:
        _log.exception("rank %s cannot go on", rank)
    return 1


if __name__ == "__main__":
    # Without cleaning up: torch may wait for ranks that have ended, and rank 0 for this one.
    os._exit(main())
