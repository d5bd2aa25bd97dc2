"""Parts of requests over real sockets: rows to every receiver, errors to every one, and nothing is kept of either."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from collections.abc import AsyncGenerator
from pathlib import Path
from typing import Any

import aiohttp
import pytest
import torch

from tests.encoder_service.running import RunningEncoder, png, run_encoder
from tests.encoder_service.sglang.running_port import Answer, Port, Receiver, data_uri, encode_body, run_port
from tests.encoder_service.sglang.test_pickle_frame import opcodes
from tests.integration.media import clip
from tests.integration.media_server import serve_media
from vitrine_vlm.types import MediaOptions

PART = "r_local_part_0"


@pytest.fixture
async def encoder(qwen3_vl_folder: Path, tmp_path: Path) -> AsyncGenerator[RunningEncoder, None]:
    async with run_encoder(qwen3_vl_folder, tmp_path) as running:
        yield running


@pytest.fixture
async def port(encoder: RunningEncoder) -> AsyncGenerator[Port, None]:
    async with run_port(encoder) as running:
        yield running
        await asyncio.sleep(0)
        assert running.budget.reserved_nbytes == 0
        assert encoder.admission.num_patches == 0


def rows_of(frame: bytes, like: torch.Tensor) -> torch.Tensor:
    return torch.frombuffer(bytearray(frame), dtype=like.dtype).view(-1, like.shape[1])


def texts_in(frame: bytes) -> list[Any]:
    return [argument for name, argument in opcodes(frame) if name == "BINUNICODE"]


def failed(answer: Answer, status: int, text: str) -> bool:
    assert answer.status == status, answer
    assert answer.body["status"] == "error"
    assert text in answer.body["message"], answer
    return True


async def until(condition: Any) -> None:
    async with asyncio.timeout(10):
        while not condition():
            await asyncio.sleep(0.01)


@pytest.mark.parametrize("first", ["encode", "receivers"])
async def test_all_receivers_get_the_rows_of_all_items_in_one_message(
    encoder: RunningEncoder, port: Port, first: str
) -> None:
    pictures = [png(96, 64, 1), png(64, 64, 2), png(96, 64, 1)]
    receivers = [port.receiver(), port.receiver()]
    body = encode_body(*map(data_uri, pictures))
    if first == "receivers":
        for receiver in receivers:
            assert await port.register(PART, receiver, 2) == Answer(200, None)
        call = asyncio.create_task(port.post("/encode", body))
    else:
        call = asyncio.create_task(port.post("/encode", body))
        await until(lambda: len(encoder.tower.batches) > 0)
        await asyncio.sleep(0.1)
        assert await port.register(PART, receivers[0], 2) == Answer(200, None)
        assert await receivers[0].is_silent(), "rows are sent once all receivers are known"
        assert await port.register(PART, receivers[0], 2) == Answer(200, None), "again, as after a time-out"
        assert await port.register(PART, receivers[1], 2) == Answer(200, None)
    assert await call == Answer(200, None)
    messages = [await receiver.read() for receiver in receivers]
    assert messages[0] == messages[1] and len(messages[0]) == 2
    expected = torch.cat([encoder.rows_of(picture) for picture in pictures])
    assert (rows_of(messages[0][1], expected) - expected).abs().max() < 1e-4
    value = encoder.metrics.registry.get_sample_value
    assert value("vitrine_encoder_requests_total", {"outcome": "ok"}) == 1
    assert value("vitrine_encoder_sglang_parts_total", {"outcome": "ok"}) == 1
    assert value("vitrine_encoder_items_total", {"kind": "image", "outcome": "ok"}) == 3
    assert value("vitrine_encoder_sglang_bytes_total") == 2 * expected.nbytes
    assert len(port.http._parts) == 0


@pytest.mark.parametrize("num_ports", [None, 1, 2])
async def test_receivers_may_be_named_by_the_request_itself(
    encoder: RunningEncoder, port: Port, num_ports: int | None
) -> None:
    receivers = [port.receiver() for _ in range(num_ports or 1)]
    ports = [receiver.port for receiver in receivers]
    picture = png(96, 64)
    body = encode_body(data_uri(picture), embedding_port=ports if num_ports else ports[0])
    assert await port.post("/encode", body) == Answer(200, None)
    expected = encoder.rows_of(picture)
    for receiver in receivers:
        assert (rows_of((await receiver.read())[1], expected) - expected).abs().max() < 1e-4
    bad = encode_body(data_uri(b"no picture"), embedding_port=ports if num_ports else ports[0])
    assert failed(await port.post("/encode", bad), 400, "no valid image")
    for receiver in receivers:
        (header,) = await receiver.read()
        assert any("no valid image" in text for text in texts_in(header))


@pytest.mark.parametrize("family", ["qwen3_vl", "qwen2_5_vl"])
async def test_videos_carry_their_times(family: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    async with run_encoder(request.getfixturevalue(f"{family}_folder"), tmp_path) as encoder, run_port(encoder) as port:
        videos = [clip(1, 64, 64, 8).data, clip(2, 64, 96, 16).data]
        receiver = port.receiver()
        await port.register(PART, receiver)
        items = [data_uri(videos[0], "video/mp4"), {"url": data_uri(videos[1], "video/mp4"), "fps": 4.0}]
        assert await port.post("/encode", encode_body(*items, modality="VIDEO")) == Answer(200, None)
        header, rows = await receiver.read()
        rates = [MediaOptions(), MediaOptions(fps=4.0)]
        opened = [encoder.preprocessor.open("video", each, rate) for each, rate in zip(videos, rates, strict=True)]
        assert opened[1].layout != encoder.preprocessor.open("video", videos[1]).layout, "fps changes nothing here"
        floats = [argument for name, argument in opcodes(header) if name == "BINFLOAT"]
        times = [time for each in opened for time in each.layout.timestamps_s]
        assert floats == [*times, *(each.layout.second_per_grid_t for each in opened)]
        assert {"video_timestamps", "second_per_grid_ts"} <= set(texts_in(header))
        assert len(rows) == sum(each.layout.num_tokens for each in opened) * encoder.identity.row_nbytes


async def test_an_error_reaches_all_receivers_whenever_they_register(port: Port) -> None:
    early, late = port.receiver(), port.receiver()
    await port.register(PART, early, 2)
    answer = await port.post("/encode", encode_body(data_uri(png(64, 64)), data_uri(b"no picture")))
    assert failed(answer, 400, "10 bytes that are no valid image") and answer.body["req_id"] == PART
    assert len(port.http._parts) == 1
    assert await port.register(PART, late, 2) == Answer(200, None)
    for receiver in (early, late):
        (header,) = await receiver.read()
        assert answer.body["message"] in texts_in(header)
    assert len(port.http._parts) == 0


async def test_a_receiver_that_is_not_allowed_fails_its_part_and_is_not_connected_to(encoder: RunningEncoder) -> None:
    connected: list[object] = []
    listener = await asyncio.start_server(lambda reader, writer: connected.append(reader), "127.0.0.1", 0)
    stranger = listener.sockets[0].getsockname()[1]
    async with run_port(encoder, receivers="127.0.0.1:1-1023,10.0.0.0/8") as port:
        receiver = port.receiver()
        receiver.port = stranger
        for order in ("before", "after"):
            call = None
            if order == "after":
                call = asyncio.create_task(port.post("/encode", encode_body(data_uri(png(64, 64)), req_id=order)))
                await until(lambda: len(encoder.tower.batches) > 0)
            assert failed(await port.register(order, receiver), 400, f"127.0.0.1:{stranger}")
            if call is None:
                call = asyncio.create_task(port.post("/encode", encode_body(data_uri(png(64, 64)), req_id=order)))
            assert failed(await call, 400, "--sglang-receivers")
        direct = encode_body(data_uri(png(64, 64)), embedding_port=stranger)
        assert failed(await port.post("/encode", direct), 400, "--sglang-receivers")
        direct = encode_body(data_uri(png(64, 64)), embedding_port=70, prefill_host="192.168.0.1")
        assert failed(await port.post("/encode", direct), 400, "192.168.0.1:70")
        assert port.budget.reserved_nbytes == 0
    assert not connected
    listener.close()


async def test_rows_do_not_wait_for_ever(encoder: RunningEncoder) -> None:
    async with run_port(encoder, timeout_s=1.0) as port:
        body = encode_body(data_uri(png(64, 64)))
        assert failed(await port.post("/encode", body), 503, "0 of the receivers have registered")
        receiver = port.receiver()
        await port.register("one", receiver, 2)
        assert failed(await port.post("/encode", body | {"req_id": "one"}), 503, "1 of 2 receivers")
        (header,) = await receiver.read()
        assert any("1 of 2 receivers" in text for text in texts_in(header))
        gone = port.receiver()
        gone._socket.close()
        await port.register("gone", gone)
        assert failed(await port.post("/encode", body | {"req_id": "gone"}), 503, "did not read the rows within 1 s")
        encoder.tower.gate.clear()
        slow = encode_body(data_uri(png(96, 64)), req_id="slow")
        assert failed(await port.post("/encode", slow), 503, "not encoded within 1 s")
        encoder.tower.gate.set()
        assert port.budget.reserved_nbytes == 0
        await asyncio.sleep(1.0)
        await port.register("another", receiver)
        assert len(port.http._parts) == 1, "what has expired is not kept"


async def test_a_language_server_that_disconnects_cancels_its_parts(encoder: RunningEncoder, port: Port) -> None:
    encoder.tower.gate.clear()
    call = asyncio.create_task(port.post("/encode", encode_body(data_uri(png(64, 64)))))
    assert await asyncio.to_thread(encoder.tower.entered.wait, 10)
    assert port.budget.reserved_nbytes > 0
    call.cancel()
    await until(lambda: port.budget.reserved_nbytes == 0 and not port.calls.count)
    encoder.tower.gate.set()
    value = encoder.metrics.registry.get_sample_value
    assert value("vitrine_encoder_requests_total", {"outcome": "cancelled"}) == 1


async def test_what_waits_for_delivery_is_bounded(encoder: RunningEncoder) -> None:
    picture = png(256, 256)
    body = encode_body(data_uri(picture))
    nbytes = len(json.dumps(body)) + encoder.rows_of(picture).nbytes
    async with run_port(encoder, max_held_bytes=nbytes + 1000) as port:
        first = asyncio.create_task(port.post("/encode", body))
        await until(lambda: port.budget.reserved_nbytes >= nbytes)
        for other in (body, encode_body("data:," + "x" * 2000)):
            refused = await port.post("/encode", other | {"req_id": "other"})
            assert failed(refused, 503, "raise --sglang-max-held-bytes")
        receiver = port.receiver()
        await port.register(PART, receiver)
        assert await first == Answer(200, None)
        await receiver.read()
        assert port.budget.reserved_nbytes == 0


async def test_a_part_is_encoded_once(encoder: RunningEncoder, port: Port) -> None:
    first = asyncio.create_task(port.post("/encode", encode_body(data_uri(png(64, 64)))))
    await until(lambda: len(encoder.tower.batches) > 0)
    assert failed(await port.post("/encode", encode_body(data_uri(png(64, 96)))), 400, "in work")
    receiver, other = port.receiver(), port.receiver()
    await port.register(PART, receiver, 2)
    assert failed(await port.register(PART, other, 3), 400, "receive_count is 3, and was 2 before")
    await port.register(PART, other, 2)
    assert await first == Answer(200, None)
    assert len(await receiver.read()) == len(await other.read()) == 2


async def test_one_item_that_fails_cancels_the_others(encoder: RunningEncoder, port: Port) -> None:
    async with serve_media() as server:
        call = asyncio.create_task(port.post("/encode", encode_body(server.url("/hangs"), data_uri(b"no picture"))))
        assert failed(await asyncio.wait_for(call, 5), 400, "no valid image")


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"req_id": ""}, "req_id"),
        ({"req_id": "x" * 513}, "req_id"),
        ({"req_id": 7}, "req_id"),
        ({"num_parts": 0}, "num_parts"),
        ({"num_parts": True}, "num_parts"),
        ({"num_parts": 10**9}, "num_parts"),
        ({"part_idx": -1}, "part_idx"),
        ({"part_idx": 1}, "part_idx is 1 of 1 parts"),
        ({"part_idx": "0"}, "part_idx"),
        ({"modality": "AUDIO"}, "modality is AUDIO"),
        ({"modality": "SMELL"}, "modality"),
        ({"mm_items": []}, "mm_items"),
        ({"mm_items": "data:,"}, "mm_items"),
        ({"mm_items": [7]}, "mm_items"),
        ({"mm_items": [["data:,"]]}, "mm_items"),
        ({"mm_items": [None]}, "mm_items"),
        ({"mm_items": ["data:,"] * 9}, "9 media items: at most 8"),
        ({"mm_items": ["ftp://host/picture"]}, "item 0 is a URL with scheme 'ftp'"),
        ({"mm_items": ["relative/picture.png"]}, "an absolute path"),
        ({"mm_items": ["/etc/passwd"]}, "file: URLs are not accepted"),
        ({"mm_items": ["file:///etc/passwd"]}, "file: URLs are not accepted"),
        ({"mm_items": [{}]}, "url"),
        ({"mm_items": [{"url": "data:,", "max_frames": 3}]}, "item 0 has max_frames"),
        ({"mm_items": [{"url": "data:,", "preprocess_kwargs": {"max_pixels": 3}}]}, "preprocess_kwargs"),
        ({"mm_items": [{"url": "data:,", "format": "precomputed_embedding"}]}, "item 0 has format"),
        ({"mm_items": [{"url": "data:,", "fps": 2}]}, "an image and has fps 2"),
        ({"mm_items": [{"url": "data:,", "fps": -1}]}, "fps"),
        ({"mm_items": [{"url": "data:,", "detail": "huge"}]}, "detail"),
        ({"mm_items": [{"url": "data:,", "content_hash": "sha256:12"}]}, "content_hash"),
        ({"mm_items": [{"url": "data:,x", "content_hash": "sha256:" + "0" * 64}]}, "its file has sha256:2d711642b726b"),
        ({"embedding_port": 0}, "embedding_port"),
        ({"embedding_port": []}, "embedding_port"),
        ({"embedding_port": [1] * 1025}, "embedding_port"),
        ({"embedding_port": True}, "embedding_port"),
        ({"embedding_port": 70, "prefill_host": None}, "prefill_host"),
        ({"embedding_port": 70, "prefill_host": "x" * 256}, "prefill_host"),
    ],
)
async def test_bad_parts_are_refused(port: Port, changed: dict[str, Any], message: str) -> None:
    assert failed(await port.post("/encode", encode_body("data:,") | changed), 400, message)


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{", b"null", b"[" * 100_000, b'{"req_id": ' + b"9" * 100_000 + b"}", b"\xff", b'"' + b"x" * 20_000],
)
@pytest.mark.parametrize("path", ["/encode", "/scheduler_receive_url"])
async def test_bodies_that_are_no_json_object_are_refused(port: Port, path: str, body: bytes) -> None:
    headers = {"Content-Type": "application/json"}
    async with port.session.post(f"{port.url}{path}", data=body, headers=headers) as response:
        assert failed(Answer(response.status, await response.json()), 400, "")
    async with port.session.post(f"{port.url}{path}", data=b"{}") as response:
        assert failed(Answer(response.status, await response.json()), 400, "content-type: application/json")


@pytest.mark.parametrize(
    "changed",
    [
        {"receive_count": 0},
        {"receive_count": 10**6},
        {"receive_count": "1"},
        {"receive_url": ""},
        {"receive_url": "127.0.0.1"},
        {"receive_url": "x" * 301},
        {"receive_url": "ipc:///tmp/socket"},
        {"req_id": "x" * 513},
    ],
)
async def test_bad_registrations_are_refused(port: Port, changed: dict[str, Any]) -> None:
    body = {"req_id": PART, "receive_count": 1, "receive_url": "127.0.0.1:70", "modality": "IMAGE"}
    assert failed(await port.post("/scheduler_receive_url", body | changed), 400, "")


async def test_items_may_be_files_base64_and_objects(qwen3_vl_folder: Path, tmp_path: Path) -> None:
    picture = png(96, 64)
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "picture 1%.png").write_bytes(picture)
    digest = f"sha256:{hashlib.sha256(picture).hexdigest()}"
    uri = data_uri(picture)
    forms = [
        str(folder / "picture 1%.png"),
        (folder / "picture 1%.png").as_uri(),
        uri.partition(",")[2],
        {"url": uri, "detail": "high", "preprocess_kwargs": {}, "max_dynamic_patch": None},
        {"url": uri, "type": "image_url", "content_hash": digest.upper().replace("SHA256", "sha256")},
        {"url": str(folder / "picture 1%.png"), "content_hash": digest},
    ]
    running = run_encoder(qwen3_vl_folder, tmp_path, allowed_folder=folder)
    async with running as encoder, run_port(encoder, folder=folder) as port:
        receiver = port.receiver()
        await port.register(PART, receiver)
        assert await port.post("/encode", encode_body(*forms)) == Answer(200, None)
        rows = (await receiver.read())[1]
        expected = torch.cat([encoder.rows_of(picture)] * len(forms))
        assert (rows_of(rows, expected) - expected).abs().max() < 1e-4
        outside = encode_body(str(folder / ".." / "other.png"))
        assert failed(await port.post("/encode", outside), 400, "outside the folder")


async def test_health_says_whether_parts_are_served(encoder: RunningEncoder) -> None:
    async def health(port: Port) -> tuple[int, str]:
        async with port.session.get(f"{port.url}/health") as response:
            return response.status, await response.text()

    async with run_port(encoder, loaded=False) as port:
        assert await health(port) == (503, "loading the model")
        assert failed(await port.post("/encode", encode_body("data:,")), 503, "still loading")
        assert failed(await port.register(PART, port.receiver()), 503, "still loading")
    async with run_port(encoder) as port:
        assert await health(port) == (200, "OK")
        port.reasons[0] = "shutting down"
        assert await health(port) == (503, "shutting down")


async def test_other_transfer_backends_and_paths_are_refused(port: Port) -> None:
    for path in ("/send", "/scheduler_receive_meta_data"):
        assert failed(await port.post(path, {"req_id": PART}), 400, "zmq_to_scheduler")
    assert failed(await port.post("/generate", {}), 404, "POST /generate")


async def test_each_request_is_a_line_in_the_log(
    encoder: RunningEncoder, port: Port, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    receiver = port.receiver()
    assert await port.register(PART, receiver) == Answer(200, None)
    assert await port.post("/encode", encode_body(data_uri(png(96, 64, 1)))) == Answer(200, None)
    assert failed(await port.post("/encode", encode_body("data:,")), 400, "")
    async with port.session.get(f"{port.url}/health"):
        pass
    registered, encoded, refused = (
        {"line": record.getMessage(), **record.fields} for record in caplog.records if hasattr(record, "fields")
    )
    assert registered["line"].startswith("POST /scheduler_receive_url: 200 in ")
    assert encoded["line"].startswith("POST /encode: 200 in ")
    wanted = {"status": 200, "model": encoder.identity.model, "items": 1, "tokens": 3 * 2}
    assert wanted.items() <= encoded.items()
    assert min(encoded[stage] for stage in ("preprocess_ms", "forward_ms", "elapsed_ms")) > 0
    assert (refused["status"], refused["outcome"], refused["items"]) == (400, "not_an_image", 1)


async def test_a_body_that_breaks_off_leaves_nothing(port: Port) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", int(port.url.rpartition(":")[2]))
    head = "POST /encode HTTP/1.1\r\nHost: h\r\nContent-Type: application/json\r\nContent-Length: 1000\r\n\r\n{"
    writer.write(head.encode())
    await until(lambda: port.budget.reserved_nbytes == 1)
    writer.close()
    await until(lambda: port.budget.reserved_nbytes == 0 and not port.calls.count)
    del reader


async def test_many_parts_at_once(encoder: RunningEncoder, port: Port) -> None:
    """In any order of their messages, and each receiver's rows are those of its part."""
    pictures = [png(64 + 32 * (number % 3), 64, number) for number in range(24)]
    receivers: list[Receiver] = [port.receiver() for _ in pictures]

    async def one(number: int) -> None:
        body = encode_body(data_uri(pictures[number]), req_id=f"{number}_local_part_0")
        calls = [port.post("/encode", body), port.register(f"{number}_local_part_0", receivers[number])]
        assert await asyncio.gather(*(calls if number % 2 else calls[::-1])) == [Answer(200, None)] * 2
        expected = encoder.rows_of(pictures[number])
        rows = rows_of((await receivers[number].read())[1], expected)
        assert (rows - expected).abs().max() < 1e-4

    await asyncio.gather(*map(one, range(len(pictures))))
    assert isinstance(port.session, aiohttp.ClientSession)
