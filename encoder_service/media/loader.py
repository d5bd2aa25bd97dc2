"""Loads the encoded bytes of a media item: from its message, a data: URL, a file or the network."""

from __future__ import annotations

import asyncio

import aiohttp
from yarl import URL

from vitrine_vlm.embedding_transport.wire.data_url import read_data_url
from vitrine_vlm.encoder_service.media.address_policy import CheckedResolver, check_host
from vitrine_vlm.encoder_service.media.http_url import parse_url
from vitrine_vlm.encoder_service.media.limits import MediaLimits
from vitrine_vlm.encoder_service.media.sources import read_file_url
from vitrine_vlm.errors import (
    MediaError,
    MediaNotAllowed,
    MediaNotFound,
    MediaTimeout,
    MediaTooLarge,
    MediaUnreachable,
)
from vitrine_vlm.service_runtime.byte_budget import Reserve
from vitrine_vlm.service_runtime.shown_urls import shown_url
from vitrine_vlm.types import MediaItem

_REDIRECTS = (301, 302, 303, 307, 308)
_CHUNK_BYTES = 64 * 1024
# So many that slow servers do not hold up the others, and so few that file descriptors are left.
_MAX_CONNECTIONS = 512
# Of one list: the frames of one video do not take all connections.
_MAX_FRAMES_AT_ONCE = 16


class MediaLoader:
    """Loads media items under limits. A process has one; any number of loads may run at once."""

    def __init__(self, limits: MediaLimits) -> None:
        self._limits = limits
        self._resolver = CheckedResolver(limits.allow_private_addresses)
        self._session: aiohttp.ClientSession | None = None

    async def load(self, item: MediaItem, reserve: Reserve = lambda nbytes: None) -> bytes:
        """The encoded file of `item`, at most `max_bytes` long, or its patches' bytes. The content is not checked.

        Args:
            reserve: called with the number of bytes of each part that arrives; what it raises ends the load.

        Raises:
            MediaNotAllowed: scheme, address or folder is refused by this encoder.
            MediaNotFound: no such file, or the server says there is none (404, 410).
            MediaUnreachable: no such host, connection refused or broken, any other status, too many redirects.
            MediaTimeout: connecting or the whole download took too long.
            MediaTooLarge: more than `max_bytes` bytes.
            MediaError: not a valid URL.
        """
        limits = self._limits
        if item.patches is not None:  # bounded by the pixels in their grid
            reserve(len(item.patches.data))
            return item.patches.data
        if item.data is not None:
            if len(item.data) > limits.max_bytes:
                raise MediaTooLarge(f"a {item.kind} of {len(item.data)} bytes: at most {limits.max_bytes} are accepted")
            reserve(len(item.data))
            return item.data
        url = item.url or ""
        scheme = url.partition(":")[0].lower() if ":" in url[:16] else ""
        if scheme not in ("data", "file"):
            return await self._download(parse_url(url), reserve)
        if scheme == "data":
            data = await asyncio.to_thread(read_data_url, url, limits.max_bytes)
        else:
            data = await asyncio.to_thread(read_file_url, url, limits.allowed_folder, limits.max_bytes)
        reserve(len(data))
        return data

    async def load_files(self, item: MediaItem, reserve: Reserve = lambda nbytes: None) -> tuple[bytes, ...]:
        """The encoded files of `item`: one, or one a frame of a list. `max_bytes` and `timeout_s` are for all together.

        Raises:
            MediaError: see `load`; the message names the frame.
        """
        if item.frames is None:
            return (await self.load(item, reserve),)
        nbytes, max_bytes = 0, self._limits.max_bytes
        slots = asyncio.Semaphore(_MAX_FRAMES_AT_ONCE)

        def reserve_part(part_nbytes: int) -> None:
            nonlocal nbytes
            nbytes += part_nbytes
            if nbytes > max_bytes:
                raise MediaTooLarge(
                    f"a list of frames of more than {max_bytes} bytes in all: send fewer or smaller ones"
                )
            reserve(part_nbytes)

        async def load_frame(index: int, frame: MediaItem) -> bytes:
            async with slots:
                try:
                    return await self.load(frame, reserve_part)
                except MediaError as error:
                    raise type(error)(f"frame {index}: {error}") from error

        loads = [asyncio.create_task(load_frame(index, frame)) for index, frame in enumerate(item.frames)]
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return tuple(await asyncio.gather(*loads))
        except TimeoutError as error:
            limit = f"{self._limits.timeout_s:g} s"
            raise MediaTimeout(
                f"{len(loads)} frames did not arrive within {limit}: send fewer, or the video"
            ) from error
        finally:
            for each in loads:
                each.cancel()
            await asyncio.gather(*loads, return_exceptions=True)

    async def close(self) -> None:
        """Closes connections. Loads in flight fail."""
        if self._session is not None:
            await self._session.close()
        await self._resolver.close()

    async def _download(self, url: URL, reserve: Reserve) -> bytes:
        try:
            async with asyncio.timeout(self._limits.timeout_s):
                return await self._follow(url, reserve)
        except TimeoutError as error:
            limit = f"{self._limits.timeout_s:g} s"
            raise MediaTimeout(f"{shown_url(str(url))} did not arrive within {limit}: use a faster server") from error

    async def _follow(self, url: URL, reserve: Reserve) -> bytes:
        """Downloads `url`, following redirects itself so that every hop passes the same checks."""
        for _ in range(self._limits.max_redirects + 1):
            self._check(url)
            try:
                # aiohttp must not follow redirects: it would check the next hop by the resolver alone.
                async with self._open_session().get(url, allow_redirects=False) as response:
                    if response.status not in _REDIRECTS:
                        return await self._read(url, response, reserve)
                    location = response.headers.get("Location", "")
            except aiohttp.ConnectionTimeoutError:
                raise MediaTimeout(
                    f"{shown_url(str(url))} did not accept a connection within {self._limits.connect_timeout_s:g} s"
                ) from None
            except (aiohttp.ClientConnectorDNSError, UnicodeError):
                raise MediaUnreachable(f"{shown_url(str(url))}: no such host {url.host!r}, check the URL") from None
            except aiohttp.ClientPayloadError:
                raise MediaUnreachable(
                    f"{shown_url(str(url))}: the connection broke during the download, try again"
                ) from None
            except (aiohttp.ClientError, OSError) as error:
                if isinstance(error, TimeoutError):
                    raise
                raise MediaUnreachable(f"{shown_url(str(url))}: connection failed ({type(error).__name__})") from None
            if not location:
                raise MediaUnreachable(f"{shown_url(str(url))} redirects to nowhere: give the final URL")
            url = parse_url(location, base=url)
        raise MediaUnreachable(
            f"{shown_url(str(url))}: still redirected after {self._limits.max_redirects} redirects, give the final URL"
        )

    def _check(self, url: URL) -> None:
        if url.scheme not in ("http", "https"):
            raise MediaNotAllowed(f"{shown_url(str(url))}: only https:, http:, data: and file: URLs are accepted")
        try:
            check_host(url, self._limits.allow_private_addresses)
        except MediaNotAllowed as error:
            raise MediaNotAllowed(f"{shown_url(str(url))}: {error}") from error

    async def _read(self, url: URL, response: aiohttp.ClientResponse, reserve: Reserve) -> bytes:
        if response.status in (404, 410):
            raise MediaNotFound(f"{shown_url(str(url))} does not exist (status {response.status}): check the URL")
        if response.status != 200:
            raise MediaUnreachable(f"{shown_url(str(url))} answered with status {response.status}, expected 200")
        # Unpacking would let a small download grow without bound; media is compressed already.
        if response.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise MediaUnreachable(f"{shown_url(str(url))} was sent compressed though not asked for: serve it as it is")
        max_bytes = self._limits.max_bytes
        too_large = MediaTooLarge(f"{shown_url(str(url))} holds more than {max_bytes} bytes: send a smaller file")
        if (response.content_length or 0) > max_bytes:
            raise too_large
        chunks: list[bytes] = []
        nbytes = 0
        async for chunk in response.content.iter_chunked(_CHUNK_BYTES):
            nbytes += len(chunk)
            if nbytes > max_bytes:
                raise too_large
            reserve(len(chunk))
            chunks.append(chunk)
        return b"".join(chunks)

    def _open_session(self) -> aiohttp.ClientSession:
        # Made on first use: it belongs to the running event loop.
        if self._session is None:
            self._session = aiohttp.ClientSession(
                connector=aiohttp.TCPConnector(resolver=self._resolver, limit=_MAX_CONNECTIONS),
                cookie_jar=aiohttp.DummyCookieJar(),  # one caller's cookies are not another's
                headers={"User-Agent": "vitrine", "Accept-Encoding": "identity"},
                timeout=aiohttp.ClientTimeout(total=None, sock_connect=self._limits.connect_timeout_s),
                auto_decompress=False,
                trust_env=False,  # a proxy would bypass the address policy
            )
        return self._session
