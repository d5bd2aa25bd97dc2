"""Rank 0 of a tensor parallel worker: it alone schedules and samples, and sends the other ranks each step.

In a step all ranks fill their buffers, land the media embeddings, and run their part of the decoder in lockstep: the
collectives in each layer synchronize them. So when rank 0 has finished a step, all others have landed its embeddings:
the lease's header, which rank 0 reads then, is valid for their copies, too, and the lease may be released.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from vitrine_vlm.embedding_transport.receiving.received_rows import LeasedRows
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass
from vitrine_vlm.llm_worker.engine.input_embed_buffer import Landing, PreparedStep
from vitrine_vlm.llm_worker.engine.prompt_logprobs import LogprobTensors
from vitrine_vlm.llm_worker.engine.runner import MakeRunner
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.tensor_parallel.broadcast import broadcast_embeddings
from vitrine_vlm.llm_worker.tensor_parallel.channel import Channel, FrameKind
from vitrine_vlm.llm_worker.tensor_parallel.group import TorchGroup
from vitrine_vlm.llm_worker.tensor_parallel.shared_pools import NUMBER, SharedPools
from vitrine_vlm.llm_worker.tensor_parallel.step_message import PoolLanding, StepMessage, StepSerializer
from vitrine_vlm.model_loading.checkpoint import CheckpointError


class LeadingForwardPass(ForwardPass):
    """A forward pass that all ranks run together. After a step that failed, all later ones fail."""

    reads_token_pool = False  # the host sends all tokens to the other ranks

    def __init__(
        self,
        decoder: TextDecoder,
        config: EngineConfig,
        make_runner: MakeRunner,
        group: TorchGroup,
        channels: Sequence[Channel],
        on_failure: Callable[[Exception], None],
    ) -> None:
        """Waits until the other ranks have loaded their weights, so that no collective waits for them.

        Args:
            channels: to the other ranks.
            on_failure: called where ranks may no longer be at the same step, so that none can continue.

        Raises:
            ChannelClosed: a rank has ended.
            CheckpointError: a rank has memory for another number of KV blocks than this one.
        """
        for rank, channel in enumerate(channels, 1):
            (num_blocks,) = NUMBER.unpack(channel.expect(FrameKind.LOADED))
            if num_blocks != config.num_blocks:
                raise CheckpointError(
                    f"rank {rank} has memory for {num_blocks} blocks of keys and values, rank 0 for "
                    f"{config.num_blocks}: use GPUs of one kind, or set the number of tokens with --kv-cache-tokens"
                )
        super().__init__(decoder, config, make_runner)
        self._group, self._channels, self._on_failure = group, channels, on_failure
        self._pools = SharedPools(channels)
        self._serializer = StepSerializer()
        self._in_lockstep = True

    def run(self, prepared: PreparedStep) -> tuple[torch.Tensor, list[LogprobTensors]]:
        if not self._in_lockstep:
            raise RuntimeError("ranks may be at different steps since one has failed: the worker is about to end")
        try:
            self._send(prepared)
            return super().run(prepared)
        except Exception as error:
            self._in_lockstep = False
            self._on_failure(error)
            raise

    def _send(self, prepared: PreparedStep) -> None:
        inputs = prepared.inputs
        shared: list[PoolLanding] = []
        own: list[Landing] = []
        for landing in (each for landings in prepared.landings.values() for each in landings):
            pool_landing = self._pool_landing(landing)
            if pool_landing is not None:
                shared.append(pool_landing)
            else:
                own.append(landing)
        # One range over all of them: the tokens between them are the same on every rank anyway.
        broadcast = (min(each.start for each in own), max(each.stop for each in own)) if own else (0, 0)
        step = StepMessage(
            self.buffer.staged_integers(len(inputs.slot_mapping_T)),
            inputs.sequences,
            prepared.sampled_tokens,
            inputs.deepstack_NTC is not None,
            shared,
            broadcast,
            [(each.start, each.stop) for each in prepared.scored],
        )
        payload = self._serializer.serialize_step(step)
        for channel in self._channels:
            channel.send(FrameKind.STEP, payload)
        broadcast_embeddings(self._group, self.buffer, broadcast)

    def _pool_landing(self, landing: Landing) -> PoolLanding | None:
        """The message by which the other ranks land these embeddings themselves; None where they cannot."""
        leased = landing.embeddings
        number = self._pools.number_of(leased.mapping) if isinstance(leased, LeasedRows) else None
        if not isinstance(leased, LeasedRows) or number is None:
            return None
        return PoolLanding(
            number, leased.lease.offset, leased.num_tokens, landing.first_row, landing.start, landing.stop
        )
