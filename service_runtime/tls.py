"""Certificates of servers and clients, read from files anew when they have changed."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path

import grpc


@dataclass(frozen=True)
class ServerTls:
    """What a server shows, PEM files; with `client_ca_file` clients must show a certificate that it signed."""

    cert_file: Path
    key_file: Path
    client_ca_file: Path | None = None

    def credentials(self) -> grpc.ServerCredentials:
        """For a gRPC port. A certificate that is renewed in place is used for connections from then on.

        Raises:
            OSError: a file cannot be read.
        """
        shown = self._read()

        def if_changed() -> grpc.ServerCertificateConfiguration | None:
            nonlocal shown
            try:
                now = self._read()
            except OSError:  # half renewed: the old one still holds
                return None
            if now == shown:
                return None
            shown = now
            return _configuration(now)

        return grpc.dynamic_ssl_server_credentials(
            _configuration(shown),
            if_changed,  # type: ignore[arg-type]  # None is for "the same as before"
            require_client_authentication=self.client_ca_file is not None,
        )

    def context(self) -> ssl.SSLContext:
        """For an HTTP port.

        Raises:
            OSError: a file cannot be read, or is no certificate.
        """
        context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=self.client_ca_file)
        context.load_cert_chain(self.cert_file, self.key_file)
        if self.client_ca_file is not None:
            context.verify_mode = ssl.CERT_REQUIRED
        return context

    def _read(self) -> tuple[bytes, bytes, bytes | None]:
        ca = self.client_ca_file.read_bytes() if self.client_ca_file else None
        return self.key_file.read_bytes(), self.cert_file.read_bytes(), ca


@dataclass(frozen=True)
class ClientTls:
    """Whom a client trusts, and what it shows where servers ask for it; PEM files.

    server_name: what the server's certificate must name, where that is not the address by which it is reached.
    """

    ca_file: Path
    cert_file: Path | None = None
    key_file: Path | None = None
    server_name: str | None = None

    def credentials(self) -> grpc.ChannelCredentials:
        """For a new channel.

        Raises:
            OSError: a file cannot be read.
        """
        key, cert = (file.read_bytes() if file else None for file in (self.key_file, self.cert_file))
        return grpc.ssl_channel_credentials(self.ca_file.read_bytes(), key, cert)


def _configuration(read: tuple[bytes, bytes, bytes | None]) -> grpc.ServerCertificateConfiguration:
    key, cert, ca = read
    return grpc.ssl_server_certificate_configuration([(key, cert)], ca)
