"""Valid inputs of every target, to start from. What a search has found is in `corpus/`, a folder a target."""

from __future__ import annotations

import io
import json
from pathlib import Path

from PIL import Image

from tests.fuzz.targets import SEPARATOR, TARGETS
from tests.integration.media import clip, picture
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2
from vitrine_vlm.types import PROTOCOL_VERSION

CORPUS = Path(__file__).parent / "corpus"
_DATA_URL = "data:image/gif;base64,R0lGODlhAQABAIAAAAAAAP///yH5BAEAAAAALAAAAAABAAEAAAIBRAA7"


def pictures() -> list[bytes]:
    """One small picture of each format that encoders read."""
    image = Image.open(io.BytesIO(picture(1, 48, 40).data)).convert("RGB")
    files = []
    for name, options in (
        ("JPEG", {}),
        ("JPEG", {"progressive": True}),
        ("PNG", {}),
        ("GIF", {}),
        ("WEBP", {}),
        ("BMP", {}),
        ("TIFF", {"compression": "tiff_lzw"}),
    ):
        file = io.BytesIO()
        image.save(file, name, **options)
        files.append(file.getvalue())
    file = io.BytesIO()
    image.convert("P").save(file, "PNG", transparency=0)
    return [*files, file.getvalue()]


def _encode_requests() -> list[bytes]:
    item, patches = encoder_pb2.MediaItem, encoder_pb2.Patches
    png = pictures()[2]
    kinds = encoder_pb2.MEDIA_KIND_IMAGE, encoder_pb2.MEDIA_KIND_VIDEO
    options = encoder_pb2.MediaOptions(min_pixels=256, max_pixels=65536)
    frames = encoder_pb2.Frames(frames=[encoder_pb2.Frame(data=png), encoder_pb2.Frame(data=png)])
    cut = patches(data=bytes(4 * 1536), dtype="uint8", grid_thw=[1, 2, 2])
    items = [
        item(kind=kinds[0], data=png, options=options),
        item(kind=kinds[0], url=_DATA_URL),
        item(kind=kinds[0], url="https://user:password@host/a.png?token=1"),
        item(kind=kinds[0], patches=cut),
        item(kind=kinds[0], ticket=bytes(16)),
        item(kind=kinds[1], frames=frames, video_fps=2.0),
    ]
    whole = encoder_pb2.EncodeRequest(request_id="id", items=items, tenant="t", layout_only=True)
    return [encoder_pb2.EncodeRequest(items=[each]).SerializeToString() for each in items] + [whole.SerializeToString()]


def _prompt() -> llm_pb2.Prompt:
    media = [llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, data=b"x", options=llm_pb2.MediaOptions(max_pixels=9))]
    return llm_pb2.Prompt(text="What?", media=media)


def _sampling() -> llm_pb2.SamplingParams:
    grammar = llm_pb2.Grammar(choices=llm_pb2.Choices(texts=["a", "b"]))
    return llm_pb2.SamplingParams(max_tokens=3, temperature=0.5, stop=["x"], logit_bias={1: 2.0}, grammar=grammar)


def _responses() -> list[bytes]:
    response, timings = encoder_pb2.EncodeResponse, encoder_pb2.ItemTimings(load_ms=1)
    layout = encoder_pb2.Layout(grid_thw=[1, 2, 2], num_tokens=1, content_hash=bytes(32))
    lease = encoder_pb2.Lease(lease_id=1, generation=1, offset=4160, nbytes=32)
    chunk = response(chunk=encoder_pb2.Chunk(data=bytes(32), timings=timings))
    failed = response(failed=encoder_pb2.Failed(code="overloaded", message="m", retry_after_s=float("nan")))
    first = response(layout=layout).SerializeToString()
    return [
        SEPARATOR.join((first, response(ready=encoder_pb2.Ready(lease=lease)).SerializeToString())),
        SEPARATOR.join((first, chunk.SerializeToString())),
        failed.SerializeToString(),
    ]


def _chats() -> list[bytes]:
    parts = [
        {"type": "text", "text": "What <|vision_start|>?"},
        {"type": "image_url", "image_url": {"url": _DATA_URL, "detail": "low"}},
        {"type": "video_url", "video_url": {"url": "https://host/a.mp4?token=1"}, "fps": 2},
    ]
    tool = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
    body = {"model": "m", "messages": [{"role": "system", "content": "s"}, {"role": "user", "content": parts}]}
    others = {"max_tokens": 4, "temperature": 0, "stop": ["a"], "logit_bias": {"5": 1}, "n": 2, "tools": [tool]}
    form = {"response_format": {"type": "json_schema", "json_schema": {"name": "n", "schema": {"type": "object"}}}}
    return [json.dumps(each).encode() for each in (body, body | others, body | form | {"stream": True})]


def _sglang() -> list[bytes]:
    items = [_DATA_URL, {"url": "https://host/a.png", "detail": "low"}]
    part = {"req_id": "r", "num_parts": 1, "part_idx": 0, "modality": "IMAGE", "mm_items": items}
    receiver = {"req_id": "r", "receive_count": 1, "receive_url": "[::1]:70"}
    return [json.dumps(each).encode() for each in (part | {"prefill_host": "h", "embedding_port": [7]}, part, receiver)]


_URLS = [_DATA_URL, "https://user:password@host:8/a%20b.png?token=1#x\n../c", "data:video/jpeg;base64,AA,BB"]


def _built() -> dict[str, list[bytes]]:
    hello = encoder_pb2.Hello(protocol_version=PROTOCOL_VERSION, transports=["shm", "grpc"])
    probe = encoder_pb2.ConnectRequest(probe_result=encoder_pb2.ProbeResult(nonce=bytes(32), error="e"))
    connect = SEPARATOR.join((encoder_pb2.ConnectRequest(hello=hello).SerializeToString(), probe.SerializeToString()))
    kv_format = prefill_pb2.KvFormat(protocol_version=2, model="m", num_layers=2, num_key_value_heads=2, head_dim=8)
    prefill = prefill_pb2.PrefillRequest(prompt=_prompt(), sampling=_sampling(), format=kv_format, first_row=1)
    generate = llm_pb2.GenerateRequest(request_id="id", prompt=_prompt(), sampling=_sampling(), n=2)
    completion = {"model": "m", "prompt": ["a", "b"], "max_tokens": 3, "echo": True, "logprobs": 1}
    responses = {"model": "m", "input": [{"role": "user", "content": [{"type": "input_text", "text": "What?"}]}]}
    unread = [encoder_pb2.UnreadCall(call_id=1, read_lease_ids=[3])]
    release = encoder_pb2.ReleaseRequest(session_id="session", lease_ids=[1, 2], tickets=[b"t"])
    return {
        "encode_request": _encode_requests(),
        "generate_request": [generate.SerializeToString()],
        "prefill_request": [prefill.SerializeToString()],
        "connect": [connect],
        "release_request": [
            release.SerializeToString(),
            encoder_pb2.ReleaseRequest(session_id="session", unread_calls=unread).SerializeToString(),
        ],
        "encode_responses": _responses(),
        "chunk": [*_responses()[2:], _responses()[1].split(SEPARATOR)[1]],
        "lease_header": [(4160).to_bytes(8, "little") + bytes(32) + bytes(4300)],
        "url": [each.encode() for each in _URLS],
        "chat_json": _chats(),
        "completion_json": [json.dumps(completion).encode(), b'{"model": "m", "tokens": [1, 2]}'],
        "responses_json": [json.dumps(responses).encode()],
        "gateway_json": _chats(),
        "sglang_json": _sglang(),
        "picture": pictures(),
        "video": [clip(1, 64, 48, 4).data],
    }


def seeds() -> dict[str, list[bytes]]:
    """The inputs of each target by its name, those of the corpus behind those that are built here."""
    built = _built()
    assert built.keys() == TARGETS.keys()
    kept = {name: sorted((CORPUS / name).glob("*")) for name in TARGETS}
    return {name: [*built[name], *(path.read_bytes() for path in kept[name])] for name in TARGETS}
