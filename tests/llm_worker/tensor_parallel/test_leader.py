"""Rank 0 and its channels: pools that other ranks map, leases that end too early, steps that fail."""

from __future__ import annotations

import json
import socket
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.harness import request_state
from vitrine_vlm.embedding_transport.pools.pool import PROBE_NBYTES, PoolMapping
from vitrine_vlm.embedding_transport.pools.pool_source import map_source
from vitrine_vlm.embedding_transport.pools.row_source import TensorSource
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmMapping, ShmPool
from vitrine_vlm.embedding_transport.receiving.received_rows import LeasedRows
from vitrine_vlm.errors import LeaseExpired
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.runner import PlainRunner, Runner
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder
from vitrine_vlm.llm_worker.tensor_parallel.channel import Channel, ChannelClosed, FrameKind
from vitrine_vlm.llm_worker.tensor_parallel.group import TorchGroup
from vitrine_vlm.llm_worker.tensor_parallel.leader import LeadingForwardPass
from vitrine_vlm.llm_worker.tensor_parallel.shared_pools import NUMBER, SharedPools
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import ItemTimings

CPU = torch.device("cpu")
LIMITS = EngineConfig(max_num_batched_tokens=32, num_blocks=8, block_size=8, max_model_len=64)
# Alone, rank 0 runs no collective.
ALONE = TorchGroup(0, 1)


@pytest.fixture
def channels() -> Iterator[tuple[Channel, Channel]]:
    ours, theirs = map(Channel, socket.socketpair())
    yield ours, theirs
    ours.close()
    theirs.close()


@pytest.fixture
def shm_pool(tmp_path: Path) -> Iterator[ShmPool]:
    pool = ShmPool(tmp_path, 1 << 20)
    yield pool
    pool.close()


def mapped(pool: ShmPool, folder: Path) -> ShmMapping:
    return ShmMapping(folder, pool.name, pool.mapped_nbytes)


def answer_map(theirs: Channel, error: str = "") -> list[PoolMapping]:
    """Answers as a TpWorker does in another process."""
    found: list[PoolMapping] = []

    def answer() -> None:
        payload = theirs.expect(FrameKind.MAP)
        found.append(map_source(json.loads(payload[NUMBER.size :]), torch.device("cpu")))
        theirs.send(FrameKind.MAPPED, error.encode())

    threading.Thread(target=answer).start()
    return found


def test_a_pool_is_mapped_once_and_unmapped_with_rank_0(
    channels: tuple[Channel, Channel], shm_pool: ShmPool, tmp_path: Path
) -> None:
    ours, theirs = channels
    pools, pool = SharedPools([ours]), mapped(shm_pool, tmp_path)
    found = answer_map(theirs)
    number = pools.number_of(pool)
    assert number is not None and found[0].read(0, PROBE_NBYTES) == shm_pool.nonce
    assert pools.number_of(pool) == number  # sends no message
    del pool
    assert theirs.expect(FrameKind.UNMAP) == NUMBER.pack(number)


def test_a_pool_that_another_rank_cannot_map_is_not_shared(
    channels: tuple[Channel, Channel], shm_pool: ShmPool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    ours, theirs = channels
    pools, pool = SharedPools([ours]), mapped(shm_pool, tmp_path)
    answer_map(theirs, "the encoder's GPU is not visible here")
    assert pools.number_of(pool) is None
    assert pools.number_of(pool) is None
    [warning] = caplog.records
    assert "rank 0 broadcasts" in warning.getMessage() and "not visible here" in warning.getMessage()


def test_the_end_of_a_rank_is_noticed(channels: tuple[Channel, Channel]) -> None:
    ours, theirs = channels
    theirs.close()
    with pytest.raises(ChannelClosed):
        ours.receive()
    with pytest.raises(ChannelClosed):
        ours.send(FrameKind.STEP, bytes(1 << 22))


def test_a_frame_whose_length_is_a_lie_is_refused() -> None:
    raw, theirs = socket.socketpair()
    with raw, theirs:
        raw.sendall(bytes([FrameKind.STEP]) + (1 << 62).to_bytes(8, "little"))
        with pytest.raises(ValueError, match="at most"):
            Channel(theirs).receive()


Interfere = Callable[[], None]


def leading(decoder: TextDecoder, interfere: Interfere, failures: list[Exception]) -> LeadingForwardPass:
    """Calls a function while the decoder runs."""

    class Interfered(PlainRunner):
        def __call__(self, inputs: StepInputs) -> torch.Tensor:
            interfere()
            return super().__call__(inputs)

    def make_runner(decoder: TextDecoder, kv_cache: KvCache, buffer: InputEmbedBuffer) -> Runner:
        return Interfered(decoder, kv_cache, buffer)

    return LeadingForwardPass(decoder, LIMITS, make_runner, ALONE, [], failures.append)


@pytest.fixture(scope="module")
def decoder(qwen3_vl_folder: Path) -> TextDecoder:
    return build_decoder(open_checkpoint(str(qwen3_vl_folder)), CPU, torch.float32)


def sequence(forward_pass: LeadingForwardPass, rows: LeasedRows | None = None) -> RequestState:
    spans = (MediaSpan(0, 2, rows.num_tokens, 0),) if rows is not None else ()
    prompt = ExpandedPrompt(list(range(40, 52)), torch.arange(12).expand(3, -1), 12, spans)
    made = request_state(prompt, [rows] if rows is not None else [])
    assert forward_pass.kv_cache.append_slots(made.table, 12)
    return made


@pytest.mark.parametrize("num_blocks", [LIMITS.num_blocks - 1, LIMITS.num_blocks + 1])
def test_ranks_with_other_room_for_keys_and_values_are_refused(
    decoder: TextDecoder, channels: tuple[Channel, Channel], num_blocks: int
) -> None:
    ours, theirs = channels
    theirs.send(FrameKind.LOADED, NUMBER.pack(num_blocks))
    with pytest.raises(CheckpointError, match=f"rank 1 has memory for {num_blocks} blocks .* rank 0 for 8"):
        LeadingForwardPass(decoder, LIMITS, PlainRunner, ALONE, [ours], on_failure=lambda error: None)


@torch.inference_mode()
def test_a_lease_that_ends_within_the_step_does_not_pass_its_check(
    decoder: TextDecoder, shm_pool: ShmPool, tmp_path: Path
) -> None:
    width = decoder.config.hidden_size * (1 + decoder.config.num_deepstack)
    blocks = [shm_pool.allocate(5 * width * 4, lease_id) for lease_id in (1, 2)]
    pool, leased = mapped(shm_pool, tmp_path), []
    for lease_id, block in enumerate(blocks, start=1):
        assert block is not None
        lease = encoder_pb2.Lease(
            lease_id=lease_id, offset=block.offset, nbytes=block.nbytes, generation=block.generation
        )
        shm_pool.write(block, TensorSource(torch.randn(5, width)))
        rows_TW = pool.rows(block.offset, (5, width), torch.float32)
        leased.append(LeasedRows(5, ItemTimings(), pool, lease, rows_TW, lambda lease_id: None))
    failures: list[Exception] = []
    assert blocks[0] is not None
    forward_pass = leading(decoder, lambda: shm_pool.release(blocks[0]), failures)  # type: ignore[arg-type]
    chunks = [Chunk(sequence(forward_pass, rows), 0, 12, True) for rows in (leased[0], None)]
    chunks.append(Chunk(sequence(forward_pass, leased[1]), 0, 8, True))

    output = forward_pass(chunks)

    assert not output.failed and not failures
    [lost], [held] = output.landed[chunks[0]], output.landed[chunks[2]]
    with pytest.raises(LeaseExpired):
        lost()
    held()


@torch.inference_mode()
def test_no_step_follows_one_that_failed_as_other_ranks_may_have_run_it(decoder: TextDecoder) -> None:
    failures: list[Exception] = []
    errors: list[Exception] = [MemoryError("no room")]

    def fail_once() -> None:
        if errors:
            raise errors.pop()

    forward_pass = leading(decoder, fail_once, failures)
    chunks = [Chunk(sequence(forward_pass), 0, 12, True)]
    with pytest.raises(MemoryError):
        forward_pass(chunks)
    with pytest.raises(RuntimeError, match="different steps"):
        forward_pass(chunks)
    assert [str(each) for each in failures] == ["no room"]
