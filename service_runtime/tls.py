"""Certificates of servers and clients; changed files are read again for new connections, of gRPC for new channels."""

from __future__ import annotations

import ssl
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class ServerTls:
    """A server's certificate (PEM files); with `client_ca_file` clients must present a certificate of this CA."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """Returns credentials for a gRPC port. A certificate that is renewed in place is used for new connections.

        Raises:
            OSError: a file cannot be read.
        """
        current = self._read()

        def if_changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal current
            try:
                now = self._read()
            except OSError:  # partly renewed: keep the old certificate
                return None
            if now == current:
                return None
            current = now
            return _configuration(now)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(current),
            if_changed,  # type: ignore[arg-type]  # None means unchanged
            require_client_authentication=self.client_ca_file is not None,
        )

    def context(self) -> ssl.SSLContext:
        """Returns the context of an HTTP port. A certificate that is renewed in place is used for new connections.

        Raises:
            OSError: a file cannot be read, or is not a certificate.
        """
        latest = _latest_context(self._read, self._context_of_files)

        def use_latest(connection: ssl.SSLObject, server_name: str | None, context: ssl.SSLContext) -> None:
            """OpenSSL calls it at the begin of each handshake, also of one that names no server."""
            connection.context = latest()

        front = self._context_of_files()
        front.sni_callback = use_latest
        return front

    def _context_of_files(self) -> ssl.SSLContext:
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.client_ca_file)
        context.load_cert_chain(self.cert_file, self.key_file)
        if self.client_ca_file is not None:
            context.verify_mode = ssl.CERT_REQUIRED
            # A client that resumes a session shows no certificate again, not even once its CA is no longer trusted.
            # (With TLS 1.2 one may still resume for two hours: Python cannot turn off OpenSSL's own cache.)
            context.options |= ssl.OP_NO_TICKET
            context.num_tickets = 0
        return context

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        """
        Raises:
            OSError: a file cannot be read, or has nothing in it yet: gRPC takes empty CAs, and refuses all clients.
        """
        ca = _bytes_of(self.client_ca_file) if self.client_ca_file else None
        return _bytes_of(self.key_file), _bytes_of(self.cert_file), ca


@dataclass(frozen=True)
class ClientTls:
    """The CA that a client trusts, and its own certificate for servers that require one (PEM files).

    server_name: the name in the server's certificate, if it differs from the host of the address.
    """

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """Returns credentials for a new channel.

        Raises:
            OSError: a file cannot be read.
        """
        key, cert = (file.read_bytes() if file else None for file in (self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(self.ca_file.read_bytes(), key, cert)

    def context(self) -> ssl.SSLContext:
        """Returns the context of connections to HTTPS servers; each must be given `server_name`.

        Raises:
            OSError: a file cannot be read, or is not a certificate.
        """
        context = ssl.create_default_context(cafile=self.ca_file)
        if self.cert_file is not None:
            context.load_cert_chain(self.cert_file, self.key_file)
        return context

    def contexts(self) -> Callable[[], ssl.SSLContext]:
        """Returns a function for the context of the next connection, another one once a file has changed.

        Raises:
            OSError: a file cannot be read, or is not a certificate.
        """
        return _latest_context(self._versions, self.context)

    def _versions(self) -> list[tuple[int, int, int]]:
        """By which a file that was renewed is known, without reading it for each request."""
        files = [file.stat() for file in (self.ca_file, self.cert_file, self.key_file) if file is not None]
        return [(file.st_mtime_ns, file.st_ino, file.st_size) for file in files]


def _bytes_of(file: Path) -> bytes:
    data = file.read_bytes()
    if not data:
        raise OSError(f"{file} is empty: write certificates into it")
    return data


def _configuration(read: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
    key, cert, ca = read
    return grpc.ssl_server_certificate_configuration([(key, cert)], ca)


def _latest_context(version: Callable[[], object], make: Callable[[], ssl.SSLContext]) -> Callable[[], ssl.SSLContext]:
    """Returns a function for the context of the files as they are now, made again once their version is another one."""
    seen, current = version(), make()

    def latest() -> ssl.SSLContext:
        nonlocal seen, current
        with suppress(OSError):  # partly renewed: keep the old certificate
            now = version()
            if now != seen:
                current = make()
                seen = now
        return current

    return latest
