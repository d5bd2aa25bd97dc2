"""Every decoder of bytes that a stranger sends, as a function of bytes.

A target raises nothing but a fault: what the decoder may raise, an error with a code, is caught here. Bytes that are no
protobuf message never reach a decoder, see `service_runtime/grpc_requests.py`.
"""

from __future__ import annotations

import asyncio
import functools
import json
import struct
from collections.abc import AsyncIterator, Callable
from contextlib import aclosing, suppress
from pathlib import Path
from typing import Any, TypeVar

import torch
from google.protobuf.message import DecodeError, Message

import vitrine_vlm.sample_models.tiny_vlm
from vitrine_vlm.embedding_transport.clients.encode_stream import EncodeStream
from vitrine_vlm.embedding_transport.clients.encoder_peer import EncoderDescription, EncoderPeer
from vitrine_vlm.embedding_transport.fleet.row_peer import Connection, ConnectOptions
from vitrine_vlm.embedding_transport.pools.leases import LeaseTable
from vitrine_vlm.embedding_transport.pools.pool import HEADER_NBYTES, PAGE_NBYTES, PoolMapping, PoolSource
from vitrine_vlm.embedding_transport.receiving.received_rows import HostBufferPool
from vitrine_vlm.embedding_transport.shipping.peer_rules import PeerRules
from vitrine_vlm.embedding_transport.shipping.session_rpc import check_release, read_lease_ids
from vitrine_vlm.embedding_transport.shipping.sessions import Sessions
from vitrine_vlm.embedding_transport.wire.chunk_codec import ChunkView, encode_chunk, parse_response
from vitrine_vlm.embedding_transport.wire.data_url import read_data_url
from vitrine_vlm.embedding_transport.wire.frame_list_url import frames_of_url
from vitrine_vlm.embedding_transport.wire.messages import describe_identity
from vitrine_vlm.encoder_service.codec import item_from_proto
from vitrine_vlm.encoder_service.decoding.image_decode import open_image
from vitrine_vlm.encoder_service.decoding.plain_header import plain_header
from vitrine_vlm.encoder_service.families import processor_settings
from vitrine_vlm.encoder_service.media.http_url import parse_url
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.preprocess.preprocessor import Preprocessor
from vitrine_vlm.encoder_service.sglang.bodies import EncodeBody, ReceiverBody, parse_body, split_receive_url
from vitrine_vlm.encoder_service.sglang.media_items import media_items
from vitrine_vlm.errors import VitrineError
from vitrine_vlm.gateway.media_parts import parse_chat
from vitrine_vlm.llm_worker.engine.sampling_checks import check_sampling
from vitrine_vlm.llm_worker.frontend.openai_prompt import chat_to_generation, completion_to_generations
from vitrine_vlm.llm_worker.frontend.openai_types import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    TokenizeRequest,
)
from vitrine_vlm.llm_worker.frontend.request_parsing import parse_request
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.prefill.wire import format_from_proto, prefilled_from_proto
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.llm_worker.wire import generation_from_proto
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2
from vitrine_vlm.service_runtime.peers import Peer
from vitrine_vlm.service_runtime.shown_urls import shown_url, without_url_secrets
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import MediaItem, ModelIdentity

Target = Callable[[bytes], None]

CHECKPOINT = Path(vitrine_vlm.sample_models.tiny_vlm.__file__).parent / "vitrine-tiny-vlm"
# What is between these, a target that takes several texts or messages takes for one.
SEPARATOR = b"\xfe\xed"
LIMITS = MediaLimits(max_bytes=1 << 20, max_pixels=1 << 20, max_frames=1000, max_video_pixels=4 << 20)
DEFAULTS = SamplingDefaults(1.0, 1.0, 0, frozenset({1}))
# What decoding media may raise. A decoder's process answers a MemoryError with MediaTooLarge; FFmpeg also reports one
# where a damaged file states a length that no memory has.
OF_DECODERS = (VitrineError, MemoryError)
_VOCAB_SIZE = 512
_MAX_ITEMS = 64
_POOL_NBYTES = 1 << 16

MessageT = TypeVar("MessageT", bound=Message)


def parsed(kind: type[MessageT], data: bytes) -> MessageT | None:
    """The message, or None where a service refuses the bytes before its decoder."""
    with suppress(DecodeError):
        return kind.FromString(data)
    return None


@functools.cache
def preprocessor() -> Preprocessor:
    return Preprocessor(processor_settings(open_checkpoint(str(CHECKPOINT))), LIMITS)


@functools.cache
def tokenizer() -> PromptTokenizer:
    return PromptTokenizer(open_checkpoint(str(CHECKPOINT)))


def open_item(item: MediaItem) -> None:
    """Everything that an encoder does with an item's bytes."""
    if item.url is not None:
        if item.url[:5].lower() == "data:":
            read_data_url(item.url, LIMITS.max_bytes)
        else:
            shown_url(str(parse_url(item.url)))
    elif item.patches is not None:
        preprocessor().open_patches(item.kind, item.patches).patches()
    elif item.data is not None:
        preprocessor().open(item.kind, item.data, item.options).patches()
    elif item.frames is not None:
        preprocessor().open_frames([frame.data or b"" for frame in item.frames], item.options).patches()


def encode_request(data: bytes) -> None:
    request = parsed(encoder_pb2.EncodeRequest, data)
    for index, message in enumerate(request.items[:_MAX_ITEMS] if request else ()):
        with suppress(*OF_DECODERS):
            open_item(item_from_proto(index, message))


def generate_request(data: bytes) -> None:
    request = parsed(llm_pb2.GenerateRequest, data)
    with suppress(VitrineError):
        if request is not None:
            generation = generation_from_proto(
                request.request_id, request.prompt, request.sampling, DEFAULTS, CacheScope()
            )
            check_sampling(generation.sampling, _VOCAB_SIZE)


def prefill_request(data: bytes) -> None:
    request = parsed(prefill_pb2.PrefillRequest, data)
    with suppress(VitrineError):
        if request is not None:
            format_from_proto(request.format)
            generation_from_proto("", request.prompt, request.sampling, DEFAULTS, CacheScope())
    if (message := parsed(prefill_pb2.Prefilled, data)) is not None:
        prefilled_from_proto(message)


def connect(data: bytes) -> None:
    """A Connect stream of any messages, at a service without pools."""
    messages = [parsed(encoder_pb2.ConnectRequest, part) for part in data.split(SEPARATOR)]

    async def requests() -> AsyncIterator[encoder_pb2.ConnectRequest]:
        for message in messages:
            if message is not None:
                yield message

    async def run() -> None:
        sessions = Sessions([], 60.0, PeerRules(), lambda session: None, lambda session: None)
        with suppress(VitrineError):
            async with aclosing(sessions.connect(requests(), Peer("127.0.0.1"))) as responses:
                async for response in responses:
                    if response.WhichOneof("message") == "session":  # nothing is read behind it
                        break
        assert len(sessions) == 0

    asyncio.run(run())


def release_request(data: bytes) -> None:
    request = parsed(encoder_pb2.ReleaseRequest, data)
    with suppress(VitrineError):
        if request is not None:
            check_release(request)
            table: LeaseTable[int] = LeaseTable(60.0, lambda: 0.0, lambda block: None)
            table.grant(table.reserve_id(), "session", 0, call_id=1)
            num_released, num_unknown = table.release(request.session_id, request.lease_ids)
            assert num_released + num_unknown == len(request.lease_ids)
            assert table.release_unread(request.session_id, read_lease_ids(request)) + num_released <= 1


class Memory(PoolMapping):
    """A pool in this process."""

    def __init__(self, memory: bytes = bytes(_POOL_NBYTES)) -> None:
        super().__init__(len(memory))
        self.memory = bytearray(memory)

    def source(self) -> PoolSource:
        return {}

    def _bytes(self, offset: int, nbytes: int) -> bytes:
        assert 0 <= offset <= offset + nbytes <= self.nbytes
        return bytes(self.memory[offset : offset + nbytes])

    def _view(self, offset: int, shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
        return torch.frombuffer(self.memory, dtype=dtype, count=shape[0] * shape[1], offset=offset).view(shape)


def encode_responses(data: bytes) -> None:
    """What an encoder answers: any sequence of messages, over a pool and as chunks."""
    identity = ModelIdentity("m", "r", "qwen3_vl", 4, (1,), "float32")
    description = EncoderDescription(identity, 2, 2, "instance", 120.0)
    connection: Connection[EncoderDescription] = Connection(None, description, "s", "shm", Memory())  # type: ignore[arg-type]
    items = {0: MediaItem("image", data=b""), 1: MediaItem("video", data=b"")}
    peer = _peer()
    stream = EncodeStream(peer, connection, items, HostBufferPool(), layout_only=False, leaves=lambda _: False)
    with suppress(VitrineError):
        for part in data.split(SEPARATOR):
            event: Any = stream.receive(part)
            if event is not None and hasattr(event, "rows"):
                assert event.rows.rows_TW.shape == (event.rows.num_tokens, 8) and event.rows.num_tokens > 0
                event.rows.rows_TW.sum()
                event.rows.check()
    stream.close()


def _peer() -> EncoderPeer:
    """A peer that is not connected; leases are released into its queue."""
    return asyncio.run(_made_peer())


async def _made_peer() -> EncoderPeer:
    return EncoderPeer("127.0.0.1:9", ConnectOptions(), None)


def chunk(data: bytes) -> None:
    """The chunk codec reads what the generated classes read, and writes what it reads."""
    with suppress(VitrineError):
        view = parse_response(data, encoder_pb2.EncodeResponse)
        if isinstance(view, ChunkView):
            encoded = encode_chunk(view.item_index, view.offset, view.data, view.timings)
            again = parse_response(encoded, encoder_pb2.EncodeResponse)
            assert isinstance(again, ChunkView)
            assert again == view
            generated = parsed(encoder_pb2.EncodeResponse, encoded)
            assert generated is None or generated.chunk.data == view.data
    if (description := parsed(encoder_pb2.DescribeResponse, data)) is not None:
        with suppress(VitrineError):
            describe_identity(description)


def lease_header(data: bytes) -> None:
    """Bytes of a pool, and a lease on it that is said to be anywhere in it."""
    head, memory = data[:40].ljust(40, b"\0"), data[40:].ljust(PAGE_NBYTES + 2 * HEADER_NBYTES, b"\0")
    offset, lease_id, generation, nbytes, rows = struct.unpack("<5Q", head)
    mapping = Memory(memory)
    with suppress(VitrineError):
        mapping.read_probe(offset, nbytes)
    with suppress(VitrineError):
        mapping.rows(offset, (rows, 8), torch.float32).sum()
        mapping.check(offset, lease_id, generation, nbytes)


def url(data: bytes) -> None:
    text, _, location = data.decode(errors="surrogateescape").partition("\n")
    shown_url(text)
    without_url_secrets(text)
    with suppress(VitrineError):
        base = parse_url(text)
        shown_url(str(base))
        parse_url(location, base=base)
    with suppress(VitrineError):
        read_data_url(text, LIMITS.max_bytes)
    with suppress(VitrineError):
        frames_of_url("video", text)


def chat_json(data: bytes) -> None:
    with suppress(VitrineError):
        request = parse_request(ChatRequest, data)
        generation = chat_to_generation(request, tokenizer(), DEFAULTS, "id")
        check_sampling(generation.sampling, _VOCAB_SIZE)


def completion_json(data: bytes) -> None:
    with suppress(VitrineError):
        request = parse_request(CompletionRequest, data)
        completion_to_generations(request, tokenizer(), DEFAULTS, "id")
    for kind in (TokenizeRequest, DetokenizeRequest):
        with suppress(VitrineError):
            parse_request(kind, data)


def responses_json(data: bytes) -> None:
    with suppress(VitrineError):
        _ = parse_request(ResponsesRequest, data).messages


def gateway_json(data: bytes) -> None:
    with suppress(VitrineError):
        body = parse_chat(data, _MAX_ITEMS, several_tenants=True)
        if body.parts:  # without any, the body goes on as it is
            json.loads(body.replaced(["{}"] * len(body.parts), {}))


def sglang_json(data: bytes) -> None:
    with suppress(VitrineError):
        body = parse_body(EncodeBody, data)
        if all(isinstance(item, str) or item.content_hash is None for item in body.mm_items):  # else they are loaded
            asyncio.run(media_items(body, None, lambda nbytes: None))  # type: ignore[arg-type]
    with suppress(VitrineError):
        split_receive_url(parse_body(ReceiverBody, data).receive_url)


def picture(data: bytes) -> None:
    """Also compares the two readers of headers."""
    plain = plain_header(data, LIMITS.max_pixels)
    with suppress(*OF_DECODERS):
        assert plain in (None, open_image(data, LIMITS.max_pixels))
        preprocessor().open("image", data).patches()


def video(data: bytes) -> None:
    with suppress(*OF_DECODERS):
        preprocessor().open("video", data).patches()


TARGETS: dict[str, Target] = {
    target.__name__: target
    for target in (
        encode_request,
        generate_request,
        prefill_request,
        connect,
        release_request,
        encode_responses,
        chunk,
        lease_header,
        url,
        chat_json,
        completion_json,
        responses_json,
        gateway_json,
        sglang_json,
        picture,
        video,
    )
}
