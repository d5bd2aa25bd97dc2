"""Downloads from a real HTTP server on the loopback."""

from __future__ import annotations

import asyncio
import socket
import threading
import time
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, unused_port

from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.media.loader import MediaLoader
from vitrine_vlm.errors import (
    MediaError,
    MediaNotAllowed,
    MediaNotFound,
    MediaTimeout,
    MediaTooLarge,
    MediaUnreachable,
    Overloaded,
)
from vitrine_vlm.types import MediaItem

BODY = bytes(range(256)) * 400
LIMITS = MediaLimits(max_bytes=len(BODY), timeout_s=1.0, max_redirects=3, allow_private_addresses=True)

_LOCATION: web.AppKey[list[str]] = web.AppKey("location", list)


async def _body(request: web.Request) -> web.StreamResponse:
    return web.Response(body=BODY)


async def _chunked(request: web.Request) -> web.StreamResponse:
    """`?times=n`: the body n times over, without Content-Length."""
    response = web.StreamResponse()
    response.enable_chunked_encoding()
    await response.prepare(request)
    for _ in range(int(request.query["times"])):
        await response.write(BODY)
    return response


async def _slow(request: web.Request) -> web.StreamResponse:
    """Sends the body at once and its end after `?seconds=`."""
    response = web.StreamResponse(headers={"Content-Length": str(len(BODY))})
    await response.prepare(request)
    await response.write(BODY[:-1])
    await asyncio.sleep(float(request.query["seconds"]))
    await response.write(BODY[-1:])
    return response


async def _redirect(request: web.Request) -> web.StreamResponse:
    return web.Response(status=int(request.query.get("status", 302)), headers={"Location": request.query["to"]})


async def _countdown(request: web.Request) -> web.StreamResponse:
    left = int(request.match_info["left"])
    raise web.HTTPFound(f"../countdown/{left - 1}" if left else "/body")


async def _loop(request: web.Request) -> web.StreamResponse:
    raise web.HTTPFound("/loop")


async def _status(request: web.Request) -> web.StreamResponse:
    return web.Response(status=int(request.match_info["status"]))


async def _raw(request: web.Request) -> web.StreamResponse:
    """Answers with the target of the request line."""
    return web.Response(body=request.raw_path.encode())


async def _to_raw(request: web.Request) -> web.StreamResponse:
    return web.Response(status=302, headers={"Location": request.app[_LOCATION].pop()})


async def _broken(request: web.Request) -> web.StreamResponse:
    response = web.StreamResponse(headers={"Content-Length": str(len(BODY))})
    await response.prepare(request)
    await response.write(BODY[:1000])
    assert request.transport is not None
    request.transport.abort()
    return response


async def _gzip(request: web.Request) -> web.StreamResponse:
    assert request.headers["Accept-Encoding"] == "identity"
    return web.Response(body=b"x", headers={"Content-Encoding": "gzip"})


async def _cookie(request: web.Request) -> web.StreamResponse:
    response = web.Response(body=request.headers.get("Cookie", "none").encode())
    response.set_cookie("who", "a caller")
    return response


@pytest.fixture
async def server() -> AsyncIterator[TestServer]:
    app = web.Application()
    app.router.add_get("/body", _body)
    app.router.add_get("/chunked", _chunked)
    app.router.add_get("/slow", _slow)
    app.router.add_get("/redirect", _redirect)
    app.router.add_get("/countdown/{left}", _countdown)
    app.router.add_get("/loop", _loop)
    app.router.add_get("/status/{status}", _status)
    app.router.add_get("/broken", _broken)
    app.router.add_get("/gzip", _gzip)
    app.router.add_get("/cookie", _cookie)
    app.router.add_get("/raw/{rest:.*}", _raw)
    app.router.add_get("/to_raw", _to_raw)
    app[_LOCATION] = []
    started = TestServer(app)
    async with started:
        yield started


@pytest.fixture
async def loader() -> AsyncIterator[MediaLoader]:
    made = MediaLoader(LIMITS)
    yield made
    await made.close()


def _item(server: TestServer, path: str) -> MediaItem:
    return MediaItem("image", url=f"http://127.0.0.1:{server.port}{path}")


@pytest.mark.parametrize("path", ["/body", "/chunked?times=1", "/slow?seconds=0.05", "/countdown/2"])
async def test_downloads(server: TestServer, loader: MediaLoader, path: str) -> None:
    assert await loader.load(_item(server, path)) == BODY


@pytest.mark.parametrize("path", ["/body", "/chunked?times=1", "/slow?seconds=0.05"])
async def test_bytes_are_reserved_as_they_come(server: TestServer, loader: MediaLoader, path: str) -> None:
    reserved: list[int] = []
    for item in (_item(server, path), MediaItem("image", data=BODY), MediaItem("image", url="data:;base64,aGk=")):
        await loader.load(item, reserved.append)
    assert sum(reserved) == 2 * len(BODY) + len(b"hi")

    def full(nbytes: int) -> None:
        raise Overloaded(f"no room for {nbytes} bytes")

    with pytest.raises(Overloaded):
        await loader.load(_item(server, path), full)


async def test_name_instead_of_address(server: TestServer, loader: MediaLoader) -> None:
    assert await loader.load(MediaItem("image", url=f"http://localhost:{server.port}/body")) == BODY


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
async def test_redirects(server: TestServer, loader: MediaLoader, status: int) -> None:
    assert await loader.load(_item(server, f"/redirect?to=/body&status={status}")) == BODY


@pytest.mark.parametrize(
    ("sent", "received"),
    [
        (same, same)
        for same in (
            "/raw/a.png?user=plain",
            "/raw/a.png?credential=AK%2F2026%2Fs3&token=a%2bb+c",
            "/raw/a%2fb%7E.png?x=%5b1%5d",
            "/raw/a.png?u=http%3A%2F%2Fh%2F&t=it%27s",
            "/raw/~a;b=(c)!.png?x=[1]&y='z'&empty=&&flag",
            "/raw/a//b.png",
        )
    ]
    + [
        ("/raw/a b\u00e9.png?x=a b|\u00e9", "/raw/a%20b%C3%A9.png?x=a%20b%7C%C3%A9"),
        ("/raw/a.png?x=1#part", "/raw/a.png?x=1"),
    ],
)
async def test_path_and_query_arrive_as_they_were_sent(
    server: TestServer, loader: MediaLoader, sent: str, received: str
) -> None:
    assert await loader.load(_item(server, sent)) == received.encode()
    server.app[_LOCATION].append(sent)
    assert await loader.load(_item(server, "/to_raw")) == received.encode()


async def test_items_load_concurrently(server: TestServer, loader: MediaLoader) -> None:
    start = time.perf_counter()
    await asyncio.gather(*(loader.load(_item(server, "/slow?seconds=0.3")) for _ in range(8)))
    assert time.perf_counter() - start < 1.2  # one after the other: 2.4


@pytest.mark.parametrize(
    ("path", "error", "message"),
    [
        ("/status/404", MediaNotFound, "status 404"),
        ("/status/410", MediaNotFound, "status 410"),
        ("/status/500", MediaUnreachable, "status 500"),
        ("/status/403", MediaUnreachable, "status 403"),
        ("/status/302", MediaUnreachable, "redirects to nowhere"),
        ("/countdown/3", MediaUnreachable, "after 3 redirects"),
        ("/loop", MediaUnreachable, "after 3 redirects"),
        ("/redirect?to=/nothing-here", MediaNotFound, "404"),
        ("/redirect?to=http://169.254.169.254/latest", MediaNotAllowed, "169.254.169.254"),
        ("/redirect?to=file:///etc/passwd", MediaNotAllowed, "'file'"),
        ("/redirect?to=data:,x", MediaNotAllowed, "'data'"),
        ("/slow?seconds=5", MediaTimeout, "within 1 s"),
        ("/chunked?times=2", MediaTooLarge, f"more than {len(BODY)} bytes"),
        ("/broken", MediaUnreachable, "broke"),
        ("/gzip", MediaUnreachable, "compressed"),
    ],
)
async def test_failures(
    server: TestServer, loader: MediaLoader, path: str, error: type[MediaError], message: str
) -> None:
    with pytest.raises(error, match=message) as caught:
        await loader.load(_item(server, path))
    assert type(caught.value) is error
    # The loader goes on working.
    assert await loader.load(_item(server, "/body")) == BODY


async def test_too_large_by_its_content_length(server: TestServer) -> None:
    small = MediaLoader(MediaLimits(max_bytes=len(BODY) - 1, allow_private_addresses=True))
    start = time.perf_counter()
    with pytest.raises(MediaTooLarge):  # by Content-Length, without waiting for the slow body
        await small.load(_item(server, "/slow?seconds=5"))
    assert time.perf_counter() - start < 2
    with pytest.raises(MediaTooLarge, match=f"{len(BODY)} bytes: at most {len(BODY) - 1}"):
        await small.load(MediaItem("video", data=BODY))
    await small.close()


async def test_no_such_host_and_no_server(loader: MediaLoader) -> None:
    for host in ("no-such-host.invalid", "a" * 70 + ".invalid"):
        with pytest.raises(MediaUnreachable, match="no such host"):
            await loader.load(MediaItem("image", url=f"http://{host}/x.png"))
    with pytest.raises(MediaUnreachable, match="connection failed"):
        await loader.load(MediaItem("image", url=f"http://127.0.0.1:{unused_port()}/x.png"))


async def test_names_that_are_looked_up_for_long_hold_up_nothing_else(
    loader: MediaLoader, monkeypatch: pytest.MonkeyPatch
) -> None:
    answered = threading.Event()
    look_up = socket.getaddrinfo

    def slow(*arguments: Any, **named: Any) -> Any:
        assert answered.wait(20)
        return look_up(*arguments, **named)

    monkeypatch.setattr(socket, "getaddrinfo", slow)
    items = [MediaItem("image", url=f"http://{index}.invalid/x.png") for index in range(40)]
    downloads = [asyncio.create_task(loader.load(item)) for item in items]
    try:
        await asyncio.sleep(0.05)
        assert await asyncio.wait_for(loader.load(MediaItem("image", url="data:;base64,aGk=")), 0.5) == b"hi"
    finally:
        answered.set()
        await asyncio.gather(*downloads, return_exceptions=True)


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "[::ffff:127.0.0.1]", "0x7f.1", "2130706433"])
async def test_private_addresses_are_refused_by_default(server: TestServer, host: str) -> None:
    guarded = MediaLoader(MediaLimits())
    with pytest.raises(MediaNotAllowed):
        await guarded.load(MediaItem("image", url=f"http://{host}:{server.port}/body"))
    await guarded.close()


@pytest.mark.parametrize("url", ["ftp://example.com/x", "/etc/passwd", "x.png", "javascript:1", "gopher://x/"])
async def test_other_schemes(loader: MediaLoader, url: str) -> None:
    with pytest.raises(MediaNotAllowed, match="only https:, http:, data: and file:"):
        await loader.load(MediaItem("image", url=url))


@pytest.mark.parametrize("url", ["http://", "http://[", "http://host:port/", "http://" + "a" * 9000])
async def test_invalid_urls(loader: MediaLoader, url: str) -> None:
    with pytest.raises(MediaError):
        await loader.load(MediaItem("image", url=url))


async def test_messages_hide_secrets(loader: MediaLoader) -> None:
    with pytest.raises(MediaUnreachable) as caught:
        await loader.load(MediaItem("image", url="http://user:secret@no-such-host.invalid/x.png?token=secret"))
    assert "secret" not in str(caught.value) and "no-such-host.invalid/x.png" in str(caught.value)


async def test_callers_do_not_share_cookies(server: TestServer, loader: MediaLoader) -> None:
    for _ in range(2):
        assert await loader.load(_item(server, "/cookie")) == b"none"


async def test_bytes_data_and_files(loader: MediaLoader, tmp_path: Path) -> None:
    assert await loader.load(MediaItem("image", data=BODY)) is BODY
    assert await loader.load(MediaItem("image", url="data:;base64,aGk=")) == b"hi"
    with pytest.raises(MediaNotAllowed):
        await loader.load(MediaItem("image", url="file:///etc/passwd"))
    (tmp_path / "x.png").write_bytes(b"file")
    with_folder = MediaLoader(MediaLimits(allowed_folder=tmp_path))
    assert await with_folder.load(MediaItem("image", url=(tmp_path / "x.png").as_uri())) == b"file"


@pytest.mark.parametrize("name", ["max_bytes", "max_pixels", "timeout_s"])
def test_limits_must_be_positive(name: str) -> None:
    with pytest.raises(ValueError, match=name):
        MediaLimits(**{name: 0})  # type: ignore[arg-type]


def test_allowed_folder_must_exist(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not a folder"):
        MediaLimits(allowed_folder=tmp_path / "none")
