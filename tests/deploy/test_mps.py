"""Services that share GPUs by CUDA's Multi-Process Service: its daemon starts before them, and ends behind them."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.deploy.proc import children_of, is_running
from vitrine_vlm.deploy.launcher import mps
from vitrine_vlm.deploy.launcher.mps import Mps
from vitrine_vlm.deploy.launcher.stack import Stack, free_ports
from vitrine_vlm.service_runtime.child_process import ChildFailed

# What nvidia-cuda-mps-control 13.0 did on an H200: with -f it stays until SIGTERM, otherwise it sends what is on its
# stdin to the daemon of the folder, and fails if there is none. A server is listed once one was started.
DAEMON = """#!{python}
import json, os, pathlib, signal, sys, time
folder = pathlib.Path(os.environ["CUDA_MPS_PIPE_DIRECTORY"])
pid, server = folder / "pid", folder / "server"
if sys.argv[1:] == ["-f"]:
    ends = [signal.SIGTERM, signal.SIGINT]
    signal.pthread_sigmask(signal.SIG_BLOCK, ends)
    print("Starting control daemon", flush=True)
    pathlib.Path({seen!r}).write_text(json.dumps([os.getpid(), dict(os.environ)]))
    pid.write_text(str(os.getpid()))
    ended_by = signal.sigwait(ends)
    pathlib.Path({seen!r}).with_name("ended by").write_text(ended_by.name)
elif not pid.exists():
    sys.exit("Cannot find MPS control daemon process")
else:
    command = sys.stdin.read().split()
    if command[0] == "start_server" and {works}:
        server.write_text("724")
    elif command == ["get_server_list"] and server.exists():
        print(server.read_text())
    elif command == ["get_server_status", "724"]:
        print("ACTIVE")
"""


@pytest.fixture(autouse=True)
def no_daemon_of_the_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)


def install(folder: Path, monkeypatch: pytest.MonkeyPatch, *, works: bool) -> Path:
    """Puts a daemon on the PATH; returns the file to which it writes its process id and environment."""
    program, seen = folder / "nvidia-cuda-mps-control", folder / "seen.json"
    program.write_text(DAEMON.format(python=sys.executable, seen=str(seen), works=works))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")
    return seen


def daemon_of(seen: Path) -> tuple[int, dict[str, str]]:
    pid, environment = json.loads(seen.read_text())
    return pid, environment


async def test_a_daemon_runs_inside_of_the_context(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = install(tmp_path, monkeypatch, works=True)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    async with Mps.running() as running:
        assert running is not None
        pid, environment = daemon_of(seen)
        assert is_running(pid)
        assert "CUDA_VISIBLE_DEVICES" not in environment, "it is for all GPUs"
        folder = Path(running.environment["CUDA_MPS_PIPE_DIRECTORY"])
        assert environment["CUDA_MPS_PIPE_DIRECTORY"] == str(folder)
    assert not is_running(pid)
    assert not folder.exists()


async def test_without_a_server_services_take_turns(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    seen = install(tmp_path, monkeypatch, works=False)
    monkeypatch.setattr(mps, "_START_TIMEOUT_S", 2.0)
    async with Mps.running() as running:
        assert running is None
        assert not is_running(daemon_of(seen)[0])
    told = capsys.readouterr().err
    assert "take turns on the GPU: nvidia-cuda-mps-control had no server after 2 s" in told
    assert "Starting control daemon" in told


async def test_a_daemon_that_the_environment_names_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = install(tmp_path, monkeypatch, works=True)
    monkeypatch.setenv("CUDA_MPS_PIPE_DIRECTORY", str(tmp_path / "of the machine"))
    async with Mps.running() as running:
        assert running is None
    assert not seen.exists()


async def test_a_machine_without_mps_needs_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    async with Mps.running() as running:
        assert running is None


async def test_services_are_clients_and_fail_with_the_daemon(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen3_vl_folder: Path
) -> None:
    seen = install(tmp_path, monkeypatch, works=True)
    with pytest.raises(ChildFailed, match="mps was killed by SIGKILL"):
        async with Stack.running(qwen3_vl_folder) as stack:
            await stack.wait_ready()
            assert stack.mps is not None
            pid, _ = daemon_of(seen)
            folder = stack.mps.environment["CUDA_MPS_PIPE_DIRECTORY"].encode()
            others = set(children_of(os.getpid())) - {pid}
            assert sum(folder in Path(f"/proc/{child}/environ").read_bytes() for child in others) == 2
            os.kill(pid, signal.SIGKILL)
            await stack.unless_failed(asyncio.Event().wait())


def test_ctrl_c_ends_the_daemon_behind_its_clients(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, qwen3_vl_folder: Path
) -> None:
    seen = install(tmp_path, monkeypatch, works=True)
    command = [sys.executable, "-P", "-m", "vitrine_vlm.deploy.launcher", "serve", "--model", str(qwen3_vl_folder)]
    ports = ["--port", *map(str, free_ports(1)), "--grpc-port", *map(str, free_ports(1))]
    with subprocess.Popen(
        command + ports, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    ) as process:
        assert process.stdout is not None
        lines = iter(process.stdout.readline, "")
        assert any("share GPUs by CUDA's MPS" in line for line in lines)
        assert any("OpenAI endpoint" in line for line in lines)
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        rest = process.stdout.read()
    assert process.returncode == 0, rest
    assert not is_running(daemon_of(seen)[0])
    assert (tmp_path / "ended by").read_text() == "SIGTERM", "not by the terminal, while it has clients"


@pytest.mark.gpu
async def test_both_services_are_clients_on_a_gpu(qwen3_vl_folder: Path) -> None:
    async with Stack.running(qwen3_vl_folder) as stack:
        await stack.wait_ready()
        assert stack.mps is not None

        def answer(command: str) -> set[str]:
            assert stack.mps is not None
            environment = {**os.environ, **stack.mps.environment}
            control = ["nvidia-cuda-mps-control"]
            return set(subprocess.check_output(control, input=command, env=environment, text=True).split())

        [server] = answer("get_server_list")
        services = {str(child) for child in children_of(os.getpid())}
        assert len(answer(f"get_client_list {server}") & services) == 2


@pytest.mark.parametrize(("given", "expected"), [(None, "1"), ("0", "0")])
def test_kernels_of_a_worker_go_first(given: str | None, expected: str) -> None:
    code = (
        "import os, sys; from vitrine_vlm.encoder_service.__main__ import main\n"
        "sys.argv = ['encoder', '--port', 'none']\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "print(os.environ['CUDA_MPS_CLIENT_PRIORITY'])"
    )
    environment = os.environ | ({} if given is None else {"CUDA_MPS_CLIENT_PRIORITY": given})
    output = subprocess.run(
        [sys.executable, "-P", "-c", code], env=environment, stdout=subprocess.PIPE, text=True, check=True
    ).stdout
    assert output.splitlines()[-1] == expected
