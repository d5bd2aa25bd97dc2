"""An encoder and a worker that trust only those who show a certificate of the same authority."""

from __future__ import annotations

import asyncio
import ssl
from collections.abc import Iterator
from pathlib import Path

import aiohttp
import pytest

from tests.encoder_service.test_command_line import free_port
from tests.integration.fleet import ServiceProcess
from tests.service_runtime.authority import Files, authority
from vitrine_vlm.embedding_transport.clients.encoder_client import EncoderClient
from vitrine_vlm.errors import EncoderUnavailable


@pytest.fixture
def files(tmp_path: Path) -> Files:
    return authority(tmp_path / "authority")


@pytest.fixture
def encoder(qwen3_vl_folder: Path, tmp_path: Path, files: Files) -> Iterator[ServiceProcess]:
    process = ServiceProcess(
        "vitrine_vlm.encoder_service",
        "--model",
        str(qwen3_vl_folder),
        "--port",
        "0",
        "--metrics-port",
        str(free_port()),
        "--shm-folder",
        str(tmp_path),
        "--allowed-peers",
        "localhost",
        *tls(files),
    )
    yield process
    process.stop()


def tls(files: Files) -> list[str]:
    flags = ["--tls-cert-file", str(files.cert), "--tls-key-file", str(files.key)]
    return [*flags, "--tls-client-ca-file", str(files.ca)]


async def test_a_question_goes_through_mutual_tls_all_the_way(
    qwen3_vl_folder: Path, tmp_path: Path, files: Files, encoder: ServiceProcess
) -> None:
    address = (await asyncio.to_thread(encoder.wait_serving))["grpc"]
    metrics = f"https://{encoder.addresses['metrics']}/metrics"
    flags = ["--encoder-ca-file", str(files.ca), "--encoder-cert-file", str(files.cert)]
    worker = ServiceProcess(
        "vitrine_vlm.llm_worker",
        *("--model", str(qwen3_vl_folder), "--encoders", address, "--shm-folder", str(tmp_path)),
        *("--port", "0", "--grpc-port", "0", *tls(files), *flags, "--encoder-key-file", str(files.key)),
    )
    try:
        addresses = await asyncio.to_thread(worker.wait_serving)
        context = ssl.create_default_context(cafile=files.ca)
        url = f"https://{addresses['http']}/ready"
        async with aiohttp.ClientSession() as session:
            for needs_certificate in (url, metrics, metrics.replace("https", "http")):
                with pytest.raises(aiohttp.ClientError):
                    await session.get(needs_certificate, ssl=context)
            context.load_cert_chain(files.cert, files.key)
            async with session.get(url, ssl=context) as response:
                assert response.status == 200
                (shown,) = (await response.json())["encoders"]
            async with session.get(metrics, ssl=context) as response:
                assert "vitrine_encoder_requests" in await response.text()
        assert (shown["ready"], shown["transport"]) == (True, "shm")
    finally:
        assert worker.stop() == 0

    without = EncoderClient([address], None, shm_folder=tmp_path, connect_timeout_s=2)
    await without.start()
    with pytest.raises(EncoderUnavailable):
        await without.wait_ready(0.1)
    await without.close()
