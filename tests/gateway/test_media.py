"""Requests with media: encoders measure them, vLLM gets their sizes, and no ticket outlives its request."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import grpc
import pytest
import pytest_asyncio
from yarl import URL

from tests.encoder_service.test_command_line import free_port
from tests.gateway.conftest import Gateway, start_gateway
from tests.gateway.upstream import TOKENS, Seen, serve_upstreams
from tests.integration.fleet import ServiceProcess
from tests.integration.media import clip, picture
from tests.integration.media_server import MediaServer, serve_media
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.service_runtime.http_requests import LARGE_BODY_NBYTES

pytestmark = pytest.mark.asyncio(loop_scope="module")
CHAT = "/v1/chat/completions"
PICTURES = [picture(seed, 96, 64).data for seed in range(3)]
VIDEO = clip(1, 64, 64, 12).data


@pytest_asyncio.fixture(loop_scope="module")
async def media_server() -> AsyncIterator[MediaServer]:
    async with serve_media() as server:
        yield server


def data_url(data: bytes, kind: str = "image/png") -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


def image(data: bytes | str) -> dict[str, Any]:
    return {"type": "image_url", "image_url": {"url": data_url(data) if isinstance(data, bytes) else data}}


def video(data: bytes | str, **fields: Any) -> dict[str, Any]:
    url = data_url(data, "video/mp4") if isinstance(data, bytes) else data
    return {"type": "video_url", "video_url": {"url": url, **fields}}


def ask(*parts: dict[str, Any], **fields: Any) -> dict[str, Any]:
    content = [*parts, {"type": "text", "text": "What is it?"}]
    return {"model": "m", "messages": [{"role": "user", "content": content}], **fields}


async def answer(gateway: Gateway, body: dict[str, Any], **headers: str) -> Seen:
    """Sends a request, which must succeed; returns what a server has seen of it."""
    for upstream in gateway.upstreams:
        upstream.seen.clear()
    async with gateway.client.post(CHAT, json=body, headers=headers) as response:
        assert response.status == 200, await response.text()
        await response.read()
    (seen,) = (each for upstream in gateway.upstreams for each in upstream.seen)
    return seen


async def refused(gateway: Gateway, body: dict[str, Any]) -> tuple[int, str, str | None]:
    async with gateway.client.post(CHAT, json=body) as response:
        error = (await response.json())["error"]
        return response.status, error["code"], error["param"]


async def num_tickets(encoder: ServiceProcess) -> int:
    async with grpc.aio.insecure_channel(encoder.addresses["grpc"]) as channel:
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        return (await stub.GetStats(encoder_pb2.GetStatsRequest())).num_live_tickets


async def all_released(encoder: ServiceProcess) -> None:
    async with asyncio.timeout(5):
        while await num_tickets(encoder):
            await asyncio.sleep(0.02)


async def num_misses(encoder: ServiceProcess) -> int:
    """Items whose rows the encoder has begun to compute."""
    async with grpc.aio.insecure_channel(encoder.addresses["grpc"]) as channel:
        stub: encoder_pb2_grpc.EncoderAsyncStub = encoder_pb2_grpc.EncoderStub(channel)
        return (await stub.GetStats(encoder_pb2.GetStatsRequest())).num_cache_misses


async def arrived(gateway: Gateway, number: int = 1) -> None:
    async with asyncio.timeout(10):
        while sum(len(upstream.seen) for upstream in gateway.upstreams) < number:
            await asyncio.sleep(0.01)


async def test_a_picture_becomes_its_size(gateway: Gateway, encoder: ServiceProcess) -> None:
    for upstream in gateway.upstreams:
        upstream.gate.clear()
    task = asyncio.create_task(answer(gateway, ask(image(PICTURES[0]), temperature=0.5)))
    await arrived(gateway)
    assert await num_tickets(encoder) == 1, "it can be claimed while the request runs"
    for upstream in gateway.upstreams:
        upstream.gate.set()
    seen = await task
    (part,) = seen.media
    assert part == {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 6]}, "uuid": part["uuid"]}
    assert len(part["uuid"]) == 64
    (entry,) = seen.body["ec_transfer_params"].values()
    assert (entry["kind"], entry["num_tokens"], entry["tenant"]) == ("image", 6, "")
    assert len(bytes.fromhex(entry["ticket"])) == 16 and entry["encoder_id"]
    assert seen.body["temperature"] == 0.5 and seen.parts[1] == {"type": "text", "text": "What is it?"}
    await all_released(encoder)


async def test_a_large_body_is_read_by_another_process(gateway: Gateway, encoder: ServiceProcess) -> None:
    """What servers get is the same, whatever the size of what stands beside the picture."""
    small = ask(image(PICTURES[0]))
    large = {**small, "user": "a" * LARGE_BODY_NBYTES + "é"}
    seen, seen_of_large = await answer(gateway, small), await answer(gateway, large)
    assert seen_of_large.media == seen.media
    assert seen_of_large.body["user"] == large["user"]
    untouched = {**large, "messages": [{"role": "user", "content": "Hi"}]}
    assert (await answer(gateway, untouched)).body == untouched
    bad = {**large, **ask(image("data:image/png;base64,@@@@"))}
    assert await refused(gateway, bad) == (400, "invalid_request", "messages[0].content[0].image_url")
    await all_released(encoder)


async def test_an_encoded_path_is_no_way_around(gateway: Gateway) -> None:
    for path in ("/v1/chat%2Fcompletions", "/v1/%63hat/completions"):
        for upstream in gateway.upstreams:
            upstream.seen.clear()
        async with gateway.client.post(URL(path, encoded=True), json=ask(image(PICTURES[0]))) as response:
            assert response.status == 200
        (seen,) = (each for upstream in gateway.upstreams for each in upstream.seen)
        assert seen.media, path


async def test_media_by_url_and_videos(gateway: Gateway, media_server: MediaServer, encoder: ServiceProcess) -> None:
    media_server.files = {"/a.png": PICTURES[0], "/v.mp4": VIDEO}
    parts = [image(media_server.url("/a.png")), video(VIDEO), video(media_server.url("/v.mp4"), fps=4)]
    seen = await answer(gateway, ask(*parts))
    still, first, second = seen.media
    assert still["uuid"] == (await answer(gateway, ask(image(PICTURES[0])))).media[0]["uuid"], "it goes by the content"
    # 1.5 s at 2 frames a second, but 4 at least; and at 4.
    for part, num_frames in ((first, 4), (second, 6)):
        grid = part["video_embeds"]["video_grid_thw"]
        times = part["video_embeds"]["timestamps"]
        assert grid[0] == num_frames // 2 == len(times) and times == sorted(times)
    assert first["uuid"] != second["uuid"], "other frames of the same video"
    assert set(seen.body["ec_transfer_params"]) == {part["uuid"] for part in seen.media}
    await all_released(encoder)


async def test_options_and_lists_of_frames_go_to_the_encoder(gateway: Gateway, encoder: ServiceProcess) -> None:
    small = {"min_pixels": 1024, "max_pixels": 2048}
    plain, own = image(PICTURES[0]), image(PICTURES[0]) | small
    seen = await answer(gateway, ask(plain, own, video(VIDEO, num_frames=2)))
    grids = [next(iter(part[part["type"]].values())) for part in seen.media]
    assert grids[0] == [1, 4, 6] and grids[1] == [1, 2, 2] and grids[2][0] == 1
    assert len({part["uuid"] for part in seen.media}) == 3
    kwargs = {"mm_processor_kwargs": small, "media_io_kwargs": {"video": {"num_frames": 2}}}
    whole = await answer(gateway, ask(plain, image(PICTURES[0]) | {"max_pixels": 1 << 20}, video(VIDEO), **kwargs))
    again = [next(iter(part[part["type"]].values())) for part in whole.media]
    assert again[0] == grids[1] and again[1] == grids[0] and again[2][0] == 1
    assert whole.media[0]["uuid"] == seen.media[1]["uuid"], "however the same options were given"
    assert {name: whole.body[name] for name in kwargs} == dict.fromkeys(kwargs), "vLLM's hashes would depend on them"
    jpegs = [data_url(each) for each in (PICTURES[0], PICTURES[0], PICTURES[0])]
    joined = "data:video/jpeg;base64," + ",".join(each.partition(",")[2] for each in jpegs)
    listed = await answer(gateway, ask({"type": "video", "video": jpegs, "fps": 1}, video(joined, fps=1)))
    first, second = listed.media
    assert first["uuid"] == second["uuid"] and first["video_embeds"] == second["video_embeds"]
    assert first["video_embeds"]["timestamps"] == [0.5, 2.0]
    await all_released(encoder)


@pytest.mark.parametrize(
    ("part", "fields", "param"),
    [
        (image(PICTURES[0]) | {"max_pixels": "9"}, {}, "messages[0].content[0].max_pixels"),
        (video(VIDEO, fps=1, nframes=2), {}, "messages[0].content[0].video_url.fps"),
        (image(PICTURES[0]), {"mm_processor_kwargs": {"patch_size": 14}}, "mm_processor_kwargs.patch_size"),
        (image(PICTURES[0]), {"mm_processor_kwargs": [1]}, "mm_processor_kwargs"),
        (video(VIDEO), {"media_io_kwargs": {"video": {"frames_indices": [1]}}}, "media_io_kwargs.video.frames_indices"),
    ],
)
async def test_options_that_encoders_do_not_have_are_refused(
    gateway: Gateway, part: dict[str, Any], fields: dict[str, Any], param: str
) -> None:
    assert await refused(gateway, ask(part, **fields)) == (400, "invalid_request", param)


async def test_equal_pictures_have_one_id_in_one_request_and_from_turn_to_turn(
    gateway: Gateway, encoder: ServiceProcess
) -> None:
    seen = await answer(gateway, ask(image(PICTURES[0]), image(PICTURES[1]), image(PICTURES[0])))
    ids = [part["uuid"] for part in seen.media]
    assert ids[0] == ids[2] != ids[1] and set(seen.body["ec_transfer_params"]) == set(ids)
    messages = ask(image(PICTURES[0]))["messages"]
    later = [*messages, {"role": "assistant", "content": "a"}, *ask(image(PICTURES[2]))["messages"]]
    first = await answer(gateway, {"messages": messages})
    second = await answer(gateway, {"messages": later})
    assert first.media[0]["uuid"] == second.media[0]["uuid"] == ids[0]
    assert first.headers["Host"] == second.headers["Host"], "the conversation stays with its server"
    await all_released(encoder)


async def test_what_the_last_message_brings_is_computed_before_any_claim(
    gateway: Gateway, encoder: ServiceProcess
) -> None:
    earlier, new = (image(picture(seed, 96, 64).data) for seed in (900, 901))
    turns: list[dict[str, Any]] = ask(earlier)["messages"]
    turns += [{"role": "assistant", "content": "A dog."}, *ask(earlier, new)["messages"]]
    before = await num_misses(encoder)
    seen = await answer(gateway, {"model": "m", "messages": turns})
    assert len({part["uuid"] for part in seen.media}) == 2
    assert await num_misses(encoder) == before + 1
    await all_released(encoder)


async def test_tenants_share_nothing(gateway: Gateway) -> None:
    seen = {tenant: await answer(gateway, ask(image(PICTURES[0])), **{"X-Tenant": tenant}) for tenant in ("", "a", "b")}
    assert len({each.media[0]["uuid"] for each in seen.values()}) == 3
    for tenant, each in seen.items():
        assert [entry["tenant"] for entry in each.body["ec_transfer_params"].values()] == [tenant]
    async with gateway.client.post(CHAT, json=ask(image(PICTURES[0])), headers={"X-Tenant": "a" * 300}) as response:
        assert response.status == 400


async def test_a_salt_is_part_of_what_caches_go_by_and_reaches_the_server_as_it_is(gateway: Gateway) -> None:
    salts: list[dict[str, Any]] = [{}, {"cache_salt": "red"}, {"cache_salt": "blue"}, {"cache_salt": None}]
    seen = [await answer(gateway, ask(image(PICTURES[0]), **salt), **{"X-Tenant": "a"}) for salt in salts]
    ids, tenants = [], []
    for salt, each in zip(salts, seen, strict=True):
        assert {name: value for name, value in each.body.items() if name == "cache_salt"} == salt
        (entry,) = each.body["ec_transfer_params"].values()
        ids.append(each.media[0]["uuid"])
        tenants.append(entry["tenant"])
    assert len(set(ids)) == len(set(tenants)) == 3
    assert tenants[0] == tenants[3] == "a" and ids[0] == ids[3]


@pytest.mark.parametrize("n", [1, 3])
async def test_streams_with_media(gateway: Gateway, encoder: ServiceProcess, n: int) -> None:
    async with gateway.client.post(CHAT, json=ask(image(PICTURES[0]), stream=True, n=n)) as response:
        events = (await response.text()).strip().split("\n\n")
    assert events[-1] == "data: [DONE]"
    choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events[:-1]]
    for index in range(n):
        text = "".join(choice["delta"]["content"] for choice in choices if choice["index"] == index)
        assert text == "".join(TOKENS)
    await all_released(encoder)


async def test_tickets_live_as_long_as_their_request(qwen3_vl_folder: Path) -> None:
    """A server may keep a request waiting for longer than a ticket lives, and may need its rows again."""
    flags = ["--model", str(qwen3_vl_folder), "--port", "0", "--ticket-ttl-s", "6"]
    encoder = ServiceProcess("vitrine_vlm.encoder_service", *flags)
    try:
        address = (await asyncio.to_thread(encoder.wait_serving))["grpc"]
        async with serve_upstreams(1) as upstreams, start_gateway(address, upstreams=upstreams) as gateway:
            gateway.upstream.gate.clear()
            task = asyncio.create_task(answer(gateway, ask(image(PICTURES[0]), image(PICTURES[1]))))
            await arrived(gateway)
            await asyncio.sleep(8)
            assert await num_tickets(encoder) == 2
            gateway.upstream.gate.set()
            await task
            await all_released(encoder)
    finally:
        encoder.stop()


@pytest.mark.parametrize("stream", [True, False])
async def test_a_client_that_disconnects_releases_its_tickets(
    gateway: Gateway, encoder: ServiceProcess, stream: bool
) -> None:
    for upstream in gateway.upstreams:
        upstream.gate.clear()
    body = ask(image(PICTURES[0]), image(PICTURES[1]), stream=stream)
    task = asyncio.create_task(gateway.client.post(CHAT, json=body).__aenter__())
    await arrived(gateway)
    assert await num_tickets(encoder) == 2
    if stream:
        response = await task
        await response.content.readuntil(b"\n\n")
        response.close()
    else:
        task.cancel()
    await all_released(encoder)
    assert sum(upstream.num_cancelled for upstream in gateway.upstreams) == 1


async def test_a_client_that_disconnects_while_media_load(
    gateway: Gateway, encoder: ServiceProcess, media_server: MediaServer
) -> None:
    body = ask(image(PICTURES[0]), image(media_server.url("/hangs")))
    task = asyncio.create_task(gateway.client.post(CHAT, json=body).__aenter__())
    await media_server.num_waiting.acquire()
    task.cancel()
    await all_released(encoder)
    assert not any(upstream.seen for upstream in gateway.upstreams)


async def test_bad_media_are_named_by_their_place(
    gateway: Gateway, encoder: ServiceProcess, media_server: MediaServer
) -> None:
    good = image(PICTURES[0])
    for bad, code in (
        (image(b"no picture"), "not_an_image"),
        (image(PICTURES[0][:20]), "media_truncated"),
        (image(media_server.url("/none")), "media_not_found"),
        (image("ftp://example.com/a.png"), "media_not_allowed"),
        (image("file:///etc/passwd"), "media_not_allowed"),
        (video(b"no video"), "not_a_video"),
        (image("data:image/png;base64,@@@@"), "invalid_request"),
        (image("not a URL"), None),
    ):
        status, found, param = await refused(gateway, ask(good, bad))
        assert status == 400 and found == (code or found), bad
        assert param is not None and param.startswith("messages[0].content[1]")
    assert (await refused(gateway, ask(*[good] * 5)))[:2] == (400, "too_many_items")
    await all_released(encoder)
    assert not any(upstream.seen for upstream in gateway.upstreams)


async def test_embeddings_of_the_client_have_no_name_of_its_own(gateway: Gateway) -> None:
    part = {"type": "image_embeds", "image_embeds": {"image_grid_thw": [1, 4, 6]}}
    named = await refused(gateway, ask({**part, "uuid": "u"}))
    assert named == (400, "invalid_request", "messages[0].content[0].uuid")
    entry = {"ticket": "0" * 32, "encoder_id": "e", "kind": "image", "num_tokens": 6, "tenant": ""}
    claimed = await refused(gateway, ask(part, ec_transfer_params={"u": entry}))
    assert claimed == (400, "invalid_request", "ec_transfer_params")
    assert await refused(gateway, ask(part, image(PICTURES[0]))) == (400, "invalid_request", "messages[0].content[0]")


async def test_lost_embeddings_are_asked_for_again(gateway: Gateway, encoder: ServiceProcess) -> None:
    """vLLM fails the request alone where its connector does not get the rows."""
    for stream in (False, True):
        for upstream in gateway.upstreams:
            upstream.reset()
            upstream.statuses = [] if stream else [500]
            upstream.fails_in_stream = int(stream)
        retries = await gateway.metric("vitrine_gateway_retries_total")
        # Both servers fail once: the second failure is the answer.
        async with gateway.client.post(CHAT, json=ask(image(PICTURES[0]), stream=stream)) as response:
            assert response.status == (200 if stream else 500)
            assert '"code": 500' in await response.text()
        seen = [each for upstream in gateway.upstreams for each in upstream.seen]
        assert [len(upstream.seen) for upstream in gateway.upstreams] == [1, 1]
        tickets = {entry["ticket"] for each in seen for entry in each.body["ec_transfer_params"].values()}
        assert len(tickets) == 2, "with a new ticket"
        assert await gateway.metric("vitrine_gateway_retries_total") == retries + 1
        gateway.upstreams[0].reset()
        gateway.upstreams[0].statuses = [] if stream else [500]
        gateway.upstreams[0].fails_in_stream = int(stream)
        async with gateway.client.post(CHAT, json=ask(image(PICTURES[0]), stream=stream)) as response:
            assert response.status == 200 and TOKENS[2] in await response.text()
    await all_released(encoder)


async def test_videos_of_a_family_that_takes_the_interval(qwen2_5_vl_folder: Path) -> None:
    encoder = ServiceProcess("vitrine_vlm.encoder_service", "--model", str(qwen2_5_vl_folder), "--port", "0")
    try:
        await asyncio.to_thread(encoder.wait_serving)
        async with (
            serve_upstreams(1) as upstreams,
            start_gateway(encoder.addresses["grpc"], upstreams=upstreams) as gateway,
        ):
            upstreams[0].video_fields = ("video_grid_thw", "second_per_grid_ts")
            # Of 8 frames a second two are sampled: 8 of 32; 14 of 63, as their number is even.
            for num_frames, grid_t, interval_s in ((32, 4, 1.0), (63, 7, 1.125)):
                seen = await answer(gateway, ask(video(clip(1, 64, 64, num_frames).data), image(PICTURES[0])))
                metadata = seen.media[0]["video_embeds"]
                assert (metadata["video_grid_thw"][0], metadata["second_per_grid_ts"]) == (grid_t, [interval_s])
            await all_released(encoder)
    finally:
        encoder.stop()


async def test_an_encoder_that_is_lost_and_comes_back(qwen3_vl_folder: Path) -> None:
    port = free_port()

    def start() -> ServiceProcess:
        flags = ["--model", str(qwen3_vl_folder), "--port", str(port)]
        return ServiceProcess("vitrine_vlm.encoder_service", *flags)

    encoder = start()
    try:
        await asyncio.to_thread(encoder.wait_serving)
        async with (
            serve_upstreams(1) as upstreams,
            start_gateway(f"127.0.0.1:{port}", upstreams=upstreams) as gateway,
        ):
            before = await answer(gateway, ask(image(PICTURES[0])))
            encoder.process.kill()
            await asyncio.to_thread(encoder.process.wait)
            assert (await refused(gateway, ask(image(PICTURES[0]))))[:2] == (503, "encoder_unavailable")
            assert (await answer(gateway, ask())).path == CHAT, "text needs no encoder"
            async with gateway.client.get("/ready") as response:
                assert response.status == 503
            encoder = start()
            await asyncio.to_thread(encoder.wait_serving)
            async with asyncio.timeout(10):
                while (await gateway.client.get("/ready")).status != 200:
                    await asyncio.sleep(0.05)
            after = await answer(gateway, ask(image(PICTURES[0])))
            assert before.media == after.media
            ids = [next(iter(each.body["ec_transfer_params"].values()))["encoder_id"] for each in (before, after)]
            assert ids[0] != ids[1]
    finally:
        encoder.stop()
