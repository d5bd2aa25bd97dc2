"""Servers are ended with everything that they have started, and those that fail say why."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare.running_server import RunningServer, ServerFailed, version_of
from benchmarks.compare.server_file import SHIPPED, InvalidServerFile, ProcessSpec, ServerSpec, free_ports
from benchmarks.process_tree import descendants
from tests.benchmarks.compare.test_figures import load, start, written
from tests.deploy.proc import is_running

# A child, one in a session of its own whose parent has ended, and one that SIGTERM does not end.
FAMILY = """
sleep 1000 & echo $! >>pids
(setsid sh -c 'echo $$ >>pids; exec sleep 1000' &)
sh -c 'trap "" TERM; echo $$ >>pids; while :; do sleep 1; done' &
wait
"""


def spec(command: str, **fields: Any) -> ServerSpec:
    return ServerSpec(name="some", processes=[ProcessSpec(command=command)], stop_grace_s=0.5, **fields)


async def pids_in(file: Path, count: int) -> list[int]:
    while not (file.exists() and len(file.read_text().split()) == count):
        await asyncio.sleep(0.02)
    return [int(pid) for pid in file.read_text().split()]


async def test_all_descendants_end_with_the_server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with RunningServer.started(spec(f"cd {tmp_path}; {FAMILY}"), "1", tmp_path):
        pids = await pids_in(tmp_path / "pids", 3)
        assert set(pids) <= descendants(os.getpid()), "an orphan's CPU time would not be counted"
        assert all(map(is_running, pids))
    assert not any(map(is_running, pids))


async def test_they_end_with_the_comparison_even_if_it_is_killed(tmp_path: Path) -> None:
    code = (
        "import asyncio, pathlib, sys\n"
        "from benchmarks.compare.running_server import RunningServer\n"
        "from benchmarks.compare.server_file import ServerSpec\n"
        "async def main(json, folder):\n"
        "    async with RunningServer.started(ServerSpec.model_validate_json(json), '1', pathlib.Path(folder)):\n"
        "        await asyncio.sleep(1000)\n"
        "asyncio.run(main(*sys.argv[1:]))"
    )
    json = spec(f"cd {tmp_path}; {FAMILY}").model_dump_json()
    process = await asyncio.create_subprocess_exec(sys.executable, "-c", code, json, str(tmp_path))
    pids = await pids_in(tmp_path / "pids", 3)
    process.send_signal(signal.SIGKILL)
    await process.wait()
    deadline = time.monotonic() + 20
    while any(map(is_running, pids)):
        assert time.monotonic() < deadline
        await asyncio.sleep(0.05)


async def test_an_interrupted_comparison_ends_its_server_and_shows_what_was_measured(tmp_path: Path) -> None:
    file = tmp_path / "some.yaml"
    file.write_text(f"name: some\nprocesses: [{{command: 'cd {tmp_path}; echo $$ >pids; exec sleep 1000'}}]\n")
    output = tmp_path / "out"
    output.mkdir()
    written(output / "records.jsonl", start("before"), load("before", "small"))
    command = [sys.executable, "-m", "benchmarks.compare", "--servers", str(file), "--output", str(output)]
    process = await asyncio.create_subprocess_exec(*command, "--small", "--resume", stderr=asyncio.subprocess.PIPE)
    [pid] = await pids_in(tmp_path / "pids", 1)
    process.send_signal(signal.SIGTERM)
    _, errors = await process.communicate()
    assert process.returncode == 130 and b"Traceback" not in errors
    assert not is_running(pid)
    assert (output / "comparison.md").read_text().startswith("# before\n")


async def test_a_server_that_ends_says_why(tmp_path: Path) -> None:
    async with RunningServer.started(spec("seq 100; echo 'no such flag: --fast' >&2; exit 3"), "1", tmp_path) as server:
        with pytest.raises(ServerFailed) as failed:
            await server.wait_ready()
    assert failed.value.message == "some ended by itself with exit code 3"
    lines = failed.value.log_tail.splitlines()
    assert lines == [f"last lines of {tmp_path}/some_server.log:", *map(str, range(82, 101)), "no such flag: --fast"]


async def test_a_server_that_is_not_ready_in_time_says_so(tmp_path: Path) -> None:
    [port] = free_ports(["port"]).values()
    async with RunningServer.started(spec("echo loading; sleep 100", ready_timeout_s=0.5), port, tmp_path) as server:
        with pytest.raises(ServerFailed, match=r"some is not ready after 0.5 s\n.*\nloading"):
            await server.wait_ready()


async def test_a_server_is_ready_once_those_behind_it_are(tmp_path: Path) -> None:
    [port] = free_ports(["port"]).values()
    command = f"cd {tmp_path}; (sleep 1; echo >late) & exec {sys.executable} -m http.server {port} --bind 127.0.0.1"
    behind = spec(command, ready="/", also_ready=[f"http://127.0.0.1:{port}/late"])
    async with RunningServer.started(behind, port, tmp_path) as server:
        await server.wait_ready()
        assert (tmp_path / "late").exists()


async def test_versions() -> None:
    assert await version_of(spec("true", version="echo some 1.0")) == "some 1.0"
    assert await version_of(spec("true", version="echo no module >&2; exit 1")) == "unknown: no module"
    assert await version_of(spec("true")) is None


def test_placeholders() -> None:
    process = ProcessSpec(
        command="${A:-b} {model} --limit '{\"image\":4}' {port} {grpc_port}", environment={"P": "{port}"}
    )
    server = ServerSpec(name="some", processes=[process])
    assert server.port_names() == {"port", "grpc_port"}
    filled = server.filled({"model": "m", "port": "1", "grpc_port": "2"}).processes[0]
    assert filled.command == "${A:-b} m --limit '{\"image\":4}' 1 2" and filled.environment == {"P": "1"}
    with pytest.raises(InvalidServerFile, match=r"some: \{grpc_port\} has no value; known here: \{model\}, \{port\}"):
        server.filled({"model": "m", "port": "1"})


ON_ONE_GPU = ["vitrine", "vllm", "vllm_default", "sglang", "sglang_default"]
ON_TWO_GPUS = ["split", "monoliths", "prefill_decode", "vllm_dp2", "vllm_split"]
ON_FOUR_GPUS = ["encoder_and_3_workers", "2_encoders_and_2_workers", "2_encoders_and_tp2", "vllm_dp4", "vllm_tp4"]
NAMES = [*ON_ONE_GPU, *(f"two_gpus/{name}" for name in ON_TWO_GPUS), *(f"four_gpus/{name}" for name in ON_FOUR_GPUS)]


def test_all_shipped_files_are_named_here() -> None:
    files = {str(file.relative_to(SHIPPED).with_suffix("")) for file in SHIPPED.rglob("*.yaml")}
    assert files == set(NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_shipped_files_can_be_read(name: str) -> None:
    server = ServerSpec.read(name)
    assert server.name == name.rpartition("/")[2]
    values = {"model": "m", "load_format": "dummy", "python": sys.executable}
    filled = server.filled({**values, **free_ports(sorted(server.port_names()))})
    assert "{" not in "".join(filled.also_ready)


def test_files_that_describe_no_server(tmp_path: Path) -> None:
    with pytest.raises(InvalidServerFile, match=r"there is no file fast; shipped along are: .*, sglang, "):
        ServerSpec.read("fast")
    file = tmp_path / "server.yaml"
    file.write_text("name: some\nprocesses: [{command: x, flags: y}]\n")
    with pytest.raises(InvalidServerFile, match="flags"):
        ServerSpec.read(str(file))
