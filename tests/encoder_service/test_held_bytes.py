"""What an encoder holds for its clients: messages, media and unread rows in one budget."""

from __future__ import annotations

import asyncio
from pathlib import Path

import grpc

from tests.encoder_service.running import image_message, png, run_encoder
from vitrine_vlm.embedding_transport.shipping.encoder_rpc import SERVICE
from vitrine_vlm.protos.encoder.v1 import encoder_pb2

PADDED = png(64, 64) + bytes(1 << 20)
TIMEOUT_S = 1.0


async def test_unread_rows_are_bounded_and_end(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    """Rows of these pictures do not fit the windows of their streams, so that all of them wait for their readers."""
    rows = png(512, 512, 1)
    # Without growing windows: else a stream takes rows that nothing reads.
    options = [("grpc.http2.bdp_probe", 0), ("grpc.use_local_subchannel_pool", 1)]
    async with run_encoder(qwen3_vl_folder, tmp_path, max_held_bytes=8 << 20, client_timeout_s=TIMEOUT_S) as encoder:
        async with grpc.aio.insecure_channel(encoder.address, options=options) as channel:
            encode = channel.unary_stream(f"/{SERVICE}/Encode", encoder_pb2.EncodeRequest.SerializeToString, bytes)
            calls = [encode(encoder_pb2.EncodeRequest(items=[image_message(rows)])) for _ in range(20)]
            peak = 0
            async with asyncio.timeout(60):
                while encoder.calls.count or peak == 0:
                    peak = max(peak, encoder.held.reserved_nbytes)
                    await asyncio.sleep(0.01)
            assert peak <= 8 << 20
            for call in calls:
                call.cancel()
        async with asyncio.timeout(10):
            while encoder.held.reserved_nbytes:
                await asyncio.sleep(0.05)


async def test_a_message_counts_until_its_call_ends(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        encoder.tower.gate.clear()
        encode = encoder.channel.unary_stream(f"/{SERVICE}/Encode", encoder_pb2.EncodeRequest.SerializeToString, bytes)
        call = encode(encoder_pb2.EncodeRequest(items=[image_message(PADDED)]))
        async with asyncio.timeout(20):
            while encoder.held.reserved_nbytes < 2 * len(PADDED):  # the message and the picture in it
                await asyncio.sleep(0.01)
        encoder.tower.gate.set()
        async for _ in call:
            pass
        async with asyncio.timeout(5):
            while encoder.held.reserved_nbytes:
                await asyncio.sleep(0.01)


async def test_compressed_requests_are_refused(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    async with run_encoder(qwen3_vl_folder, tmp_path) as encoder:
        encode = encoder.channel.unary_stream(f"/{SERVICE}/Encode", encoder_pb2.EncodeRequest.SerializeToString, bytes)
        call = encode(
            encoder_pb2.EncodeRequest(items=[image_message(bytes(1 << 20))]), compression=grpc.Compression.Gzip
        )
        assert await call.code() is grpc.StatusCode.UNIMPLEMENTED
