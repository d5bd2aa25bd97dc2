"""What one user has sent makes no answer of another one faster: neither the prefix cache nor the encoder's."""

from __future__ import annotations

import base64
from typing import Any

import grpc

from tests.integration.fleet import Fleet
from tests.integration.media import picture
from tests.integration.test_worker_process import post
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc


async def encoder_cache(fleet: Fleet) -> tuple[int, int]:
    """Hits and misses of the encoder's cache."""
    async with grpc.aio.insecure_channel(fleet.encoder.addresses["grpc"]) as channel:
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        stats = await stub.GetStats(encoder_pb2.GetStatsRequest())
    return stats.num_cache_hits, stats.num_cache_misses


async def test_a_salt_shares_nothing_with_another_and_everything_with_itself(small_fleet: Fleet) -> None:
    worker = small_fleet.worker_processes["shm"]
    item = picture(61_803, 96, 64)  # no other test of this fleet sends it: its caches must not know it
    url = f"data:image/png;base64,{base64.b64encode(item.data).decode()}"
    content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "What is in this picture?"}]
    chat = {"messages": [{"role": "user", "content": content}]}
    pad = "<|vision_start|><|image_pad|><|vision_end|> What is in this picture, and what is beside it?"
    completion = {"prompt": pad, "media": [content[0]]}

    async def cached_tokens(path: str, body: dict[str, Any], **fields: Any) -> int:
        request = {"model": small_fleet.folder.name, "max_tokens": 2, "temperature": 0, **body, **fields}
        status, answer, _ = await post(worker, path, request)
        assert status == 200, answer
        return int(answer["usage"]["prompt_tokens_details"]["cached_tokens"])

    for path, body in (("/v1/chat/completions", chat), ("/v1/completions", completion)):
        seen = []
        for salt in ({}, {"cache_salt": "red"}, {"cache_salt": "blue"}):
            hits, misses = await encoder_cache(small_fleet)
            first = await cached_tokens(path, body, **salt)
            after = await encoder_cache(small_fleet)
            second = await cached_tokens(path, body, **salt)
            seen.append((first, second > 0, after[0] - hits, after[1] - misses))
        # The completion's picture is that of the chat: of the same salt it is in the encoder's cache by then.
        is_first_path = path == "/v1/chat/completions"
        assert seen == [(0, True, 0, 1) if is_first_path else (0, True, 1, 0)] * 3
    status, answer, _ = await post(worker, "/v1/chat/completions", {"model": "m", **chat, "cache_salt": ""})
    assert (status, answer["error"]["param"]) == (400, "cache_salt")
