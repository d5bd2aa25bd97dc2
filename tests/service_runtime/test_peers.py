from __future__ import annotations

from pathlib import Path

import grpc
import pytest
from cryptography import x509
from trustme import CA

from vitrine_vlm.service_runtime.peers import Peer, PeerPatterns, peer_of

METHOD = "/test/Who"


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("worker.example", "worker.example", True),
        ("worker.example", "WORKER.example", True),
        ("worker.example", "workerXexample", False),
        ("worker.example", "worker.example.org", False),
        ("*.example", "worker.example", True),
        ("*.example", "evil.worker.example", False),
        ("*.example", ".example", False),
        ("worker-*.example", "worker-12.example", True),
        ("spiffe://example/ns/a/sa/*", "spiffe://example/ns/a/sa/worker", True),
        ("spiffe://example/ns/a/sa/*", "spiffe://example/ns/a/sa/worker/more", False),
        ("spiffe://example/ns/*/sa/worker", "spiffe://example/ns/b/sa/worker", True),
        ("spiffe://example/ns/*/sa/worker", "spiffe://evil/ns/b/sa/worker", False),
        ("*", "anything.at.all", True),
    ],
)
def test_patterns(pattern: str, name: str, matches: bool) -> None:
    assert PeerPatterns.parse(f"other, {pattern}").match(Peer("", (name,))) is matches


def test_a_peer_without_a_name_matches_nothing() -> None:
    assert not PeerPatterns.parse("*").match(Peer("127.0.0.1"))
    assert not PeerPatterns.parse("").match(Peer("a", ("a",))) and not PeerPatterns.parse("")


@pytest.mark.parametrize("names", ["a,,b", "a b", ",", " "])
def test_malformed_patterns_are_refused(names: str) -> None:
    with pytest.raises(ValueError, match="no name of a peer"):
        PeerPatterns.parse(names)


async def who(
    server_credentials: grpc.ServerCredentials | None, channel_credentials: grpc.ChannelCredentials | None
) -> Peer:
    """What a server sees of a client."""
    seen: list[Peer] = []

    async def answer(request: bytes, context: grpc.aio.ServicerContext[bytes, bytes]) -> bytes:
        seen.append(peer_of(context))
        return b""

    server = grpc.aio.server()
    handlers: dict[str, grpc.RpcMethodHandler[bytes, bytes]] = {"Who": grpc.unary_unary_rpc_method_handler(answer)}
    server.add_generic_rpc_handlers((grpc.method_handlers_generic_handler("test", handlers),))
    address = "127.0.0.1:0"
    port = (
        server.add_secure_port(address, server_credentials) if server_credentials else server.add_insecure_port(address)
    )
    await server.start()
    target = f"127.0.0.1:{port}"
    channel = (
        grpc.aio.secure_channel(target, channel_credentials)
        if channel_credentials
        else grpc.aio.insecure_channel(target)
    )
    async with channel:
        method: grpc.aio.UnaryUnaryMultiCallable[bytes, bytes] = channel.unary_unary(METHOD)
        await method(b"")
    await server.stop(None)
    return seen[0]


async def test_without_certificates_a_peer_is_its_host() -> None:
    assert await who(None, None) == Peer("127.0.0.1")


async def test_a_peer_is_what_its_certificate_names(tmp_path: Path) -> None:
    ca = CA()
    server, client = ca.issue_cert("127.0.0.1"), _named(ca, "worker.example", "spiffe://example/sa/worker")
    ca_pem = ca.cert_pem.bytes()
    pairs = [(server.private_key_pem.bytes(), server.cert_chain_pems[0].bytes())]
    seen = await who(
        grpc.ssl_server_credentials(pairs, ca_pem, require_client_auth=True),
        grpc.ssl_channel_credentials(ca_pem, *client),
    )
    assert seen == Peer("spiffe://example/sa/worker", ("spiffe://example/sa/worker", "worker.example"))
    one_sided = grpc.ssl_server_credentials(pairs)
    assert await who(one_sided, grpc.ssl_channel_credentials(ca_pem)) == Peer("127.0.0.1")


def _named(ca: CA, dns_name: str, uri: str) -> tuple[bytes, bytes]:
    """A key and a certificate with a URI, which trustme cannot write, and an e-mail address, which is not looked at."""
    from cryptography.hazmat.primitives import hashes, serialization

    issued = ca.issue_cert(dns_name)
    key = serialization.load_pem_private_key(issued.private_key_pem.bytes(), None)
    old = x509.load_pem_x509_certificate(issued.cert_chain_pems[0].bytes())
    ca_key = serialization.load_pem_private_key(ca.private_key_pem.bytes(), None)
    names = x509.SubjectAlternativeName(
        [x509.DNSName(dns_name), x509.UniformResourceIdentifier(uri), x509.RFC822Name("admin@example.org")]
    )
    builder = (
        x509.CertificateBuilder()
        .subject_name(old.subject)
        .issuer_name(old.issuer)
        .public_key(key.public_key())  # type: ignore[arg-type]
        .serial_number(x509.random_serial_number())
        .not_valid_before(old.not_valid_before_utc)
        .not_valid_after(old.not_valid_after_utc)
        .add_extension(names, critical=False)
    )
    certificate = builder.sign(ca_key, hashes.SHA256())  # type: ignore[arg-type]
    return issued.private_key_pem.bytes(), certificate.public_bytes(serialization.Encoding.PEM)
