"""Language servers that come and go while an encoder serves."""

from __future__ import annotations

from pathlib import Path

from tests.encoder_service.sglang.test_process import language_server, until
from vitrine_vlm.encoder_service.sglang.registration import Registration, parse_server_sources
from vitrine_vlm.service_runtime.supervisor import Supervisor

URL = "http://10.0.0.1:30001"


async def test_servers_are_discovered(tmp_path: Path) -> None:
    """One stands in a file, which changes; the other one is always there."""
    listed, supervisor = tmp_path / "servers", Supervisor()
    async with language_server() as first, language_server() as second, language_server() as fixed:
        listed.write_text(first.url.removeprefix("http://"))
        registration = Registration(URL, parse_server_sources(f"file:{listed},{fixed.url}"))
        registration.start(supervisor)
        await until(lambda: first.encoders == fixed.encoders == {URL})
        assert not second.asked
        listed.write_text(second.url.removeprefix("http://"))
        await until(lambda: second.encoders == {URL})
        num_asked = len(first.asked)
        await registration.end(2.0)
        assert not second.encoders and not fixed.encoders
        assert len(first.asked) == num_asked, "what is no longer listed is not asked any more"
        assert not supervisor.names() and supervisor.failure is None, "the file is read no more"
    await supervisor.close()
