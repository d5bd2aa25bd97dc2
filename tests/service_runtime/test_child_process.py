"""Child processes of the launcher: prefixed output, clean stops, and no orphans."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path

import pytest

from tests.deploy.proc import is_running
from vitrine_vlm.service_runtime.child_process import Child

STUBBORN = """
import signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print("up")
time.sleep(60)
"""
FAILING = "print('no weights'); raise SystemExit(3)"


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder whose Python files can be started with -m."""
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    return tmp_path


async def test_output_is_prefixed_and_failure_named(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (module / "failing.py").write_text(FAILING)
    child = await Child.start("encoder", ["failing"])
    failure = await child.failed()
    await child.stop(1.0)
    assert "[encoder] no weights\n" in capsys.readouterr().out
    assert "encoder ended with exit code 3" in str(failure)


async def test_lines_of_json_stay_json(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (module / "logging_json.py").write_text("""print('{"message": "[up]", "status": 200}')""")
    child = await Child.start("rank 0", ["logging_json"])
    await child.failed()
    await child.stop(1.0)
    assert json.loads(capsys.readouterr().out) == {"process": "rank 0", "message": "[up]", "status": 200}


async def test_a_line_beyond_the_limit_does_not_end_the_reading(
    module: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A service whose output is not read blocks at its next line."""
    (module / "wordy.py").write_text("print('x' * (3 << 20)); print('y' * (1 << 20)); print('end')")
    child = await Child.start("llm", ["wordy"])
    async with asyncio.timeout(20):
        assert "ended with exit code 0" in str(await child.failed())
    await child.stop(1.0)
    assert capsys.readouterr().out.endswith("[llm] end\n")


async def test_stubborn_child_is_killed(module: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (module / "stubborn.py").write_text(STUBBORN)
    child = await Child.start("llm", ["stubborn"])
    while "up" not in capsys.readouterr().out:
        await asyncio.sleep(0.01)
    await child.stop(0.2)
    assert "killed by SIGKILL" in str(await child.failed())
    assert "did not stop within 0.2 s" in capsys.readouterr().out


@contextmanager
def closed_stdout() -> Iterator[None]:
    """As behind `| head`, once it has read enough."""
    reading, writing = os.pipe()
    os.close(reading)
    stdout = os.fdopen(writing, "w")
    with redirect_stdout(stdout):
        yield
    with suppress(BrokenPipeError):
        stdout.close()


async def test_a_service_does_not_end_where_nothing_reads_its_output(module: Path) -> None:
    (module / "wordy.py").write_text("for _ in range(20_000): print('x' * 100)\nraise SystemExit(3)")
    with closed_stdout():
        child = await Child.start("llm", ["wordy"])
        async with asyncio.timeout(20):
            assert "llm ended with exit code 3" in str(await child.failed())
        await child.stop(1.0)


async def test_a_stubborn_child_is_killed_where_nothing_reads_its_output(module: Path) -> None:
    up = module / "up"
    (module / "stubborn.py").write_text(STUBBORN.replace('print("up")', f"open({str(up)!r}, 'w').close()"))
    with closed_stdout():
        child = await Child.start("llm", ["stubborn"])
        while not up.exists():
            await asyncio.sleep(0.01)
        await child.stop(0.2)
        assert "killed by SIGKILL" in str(await child.failed())


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux signals children when their parent dies")
def test_no_orphans_when_the_parent_is_killed(module: Path) -> None:
    (module / "sleeper.py").write_text("import time; time.sleep(60)")
    (module / "parent.py").write_text(
        "import asyncio\n"
        "from vitrine_vlm.service_runtime.child_process import Child\n"
        "async def main():\n"
        "    child = await Child.start('child', ['sleeper'])\n"
        "    print(child._process.pid, flush=True)\n"
        "    await asyncio.sleep(60)\n"
        "asyncio.run(main())\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{module}{os.pathsep}{Path.cwd()}"}
    with subprocess.Popen([sys.executable, "-m", "parent"], stdout=subprocess.PIPE, env=environment) as parent:
        assert parent.stdout is not None
        child_pid = int(parent.stdout.readline())
        assert is_running(child_pid)
        parent.send_signal(signal.SIGKILL)
    deadline = time.monotonic() + 5.0
    while is_running(child_pid):
        assert time.monotonic() < deadline, "the child outlived its parent"
        time.sleep(0.02)
