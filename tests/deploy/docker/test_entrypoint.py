"""The containers' process 1 with real processes; where the kernel allows it, in PID namespaces as containers have."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from functools import cache
from pathlib import Path

import pytest

ENTRYPOINT = Path(__file__).parents[3] / "deploy/docker/entrypoint.py"
START = [sys.executable, "-I", str(ENTRYPOINT)]
CONTAINER = ["unshare", "--user", "--map-root-user", "--pid", "--fork", "--mount-proc", "--kill-child"]
TIMEOUT_S = 30


@cache
def _has_namespaces() -> bool:
    try:
        return subprocess.run([*CONTAINER, "true"], capture_output=True, timeout=TIMEOUT_S).returncode == 0
    except FileNotFoundError:
        return False


def _run(*command: str, prefix: list[str] | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*(prefix or []), *START, *command], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
    )


@pytest.mark.parametrize(
    ("script", "exit_code"), [("exit 0", 0), ("exit 7", 7), ("kill -TERM $$", 128 + 15), ("kill -KILL $$", 128 + 9)]
)
def test_the_exit_code_is_the_commands(script: str, exit_code: int) -> None:
    assert _run("sh", "-c", script).returncode == exit_code


def test_arguments_and_environment_arrive_unchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MARK", "kept")
    done = _run(sys.executable, "-c", "import os, sys; print(sys.argv[1:], os.environ['MARK'])", "a b", "$HOME", "--x")
    assert done.stdout == "['a b', '$HOME', '--x'] kept\n"


@pytest.mark.parametrize(
    ("command", "exit_code", "message"),
    [
        (["no-such-command"], 127, "cannot start 'no-such-command'"),
        ([str(ENTRYPOINT.parent)], 126, "cannot start"),
        ([], 2, "nothing to start"),
    ],
)
def test_a_command_that_cannot_start_is_named(command: list[str], exit_code: int, message: str) -> None:
    done = _run(*command)
    assert done.returncode == exit_code
    assert message in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1])
def test_signals_reach_the_command(number: signal.Signals) -> None:
    script = f"trap 'echo got; exit 42' {number.name.removeprefix('SIG')}; echo ready; while :; do sleep 0.05; done"
    with subprocess.Popen([*START, "sh", "-c", script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        process.send_signal(number)
        assert process.stdout.read() == "got\n"
        assert process.wait(TIMEOUT_S) == 42


def test_a_signal_before_the_command_has_started_is_not_lost() -> None:
    """It waits while process ids are spent."""
    program = (
        "import os, runpy, signal, sys\n"
        f"sys.argv = [{str(ENTRYPOINT)!r}]\n"
        f"entrypoint = runpy.run_path({str(ENTRYPOINT)!r})\n"
        # Called by `run` once it has blocked signals; it looks the function up among its globals.
        "spend = lambda count: os.kill(os.getpid(), signal.SIGTERM)\n"
        "entrypoint['run'].__globals__['spend_process_ids'] = spend\n"
        "sys.exit(entrypoint['run'](['sleep', '20'], 1))\n"
    )
    done = subprocess.run([sys.executable, "-c", program], timeout=TIMEOUT_S, check=False)
    assert done.returncode == 128 + signal.SIGTERM


def test_the_command_starts_with_no_signal_blocked_or_ignored() -> None:
    done = _run("cat", "/proc/self/status")
    masks = dict(line.split(":\t") for line in done.stdout.splitlines() if line.startswith(("SigBlk", "SigIgn")))
    assert int(masks["SigBlk"], 16) == 0
    assert int(masks["SigIgn"], 16) & (1 << (signal.SIGPIPE - 1)) == 0


@pytest.mark.skipif(not _has_namespaces(), reason="unshare cannot make user and PID namespaces here")
class TestInAPidNamespace:
    def test_services_get_process_ids_that_differ(self) -> None:
        pids = [int(_run("sh", "-c", "echo $$", prefix=CONTAINER).stdout) for _ in range(3)]
        # Two of them are equal once in 8000 times; all of them practically never.
        assert len(set(pids)) > 1, pids
        assert min(pids) > 1

    def test_as_many_ids_are_spent_as_asked_for(self) -> None:
        program = (
            f"import os, runpy; entrypoint = runpy.run_path({str(ENTRYPOINT)!r}); entrypoint['run'](['true'], 0);"
            "first = os.posix_spawnp('true', ['true'], {}); entrypoint['spend_process_ids'](500);"
            "print(os.posix_spawnp('true', ['true'], {}) - first)"
        )
        done = subprocess.run(
            [*CONTAINER, sys.executable, "-c", program], capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        assert int(done.stdout) == 501, done.stderr

    def test_the_start_takes_no_time_to_speak_of(self) -> None:
        started = time.monotonic()
        program = f"import runpy; runpy.run_path({str(ENTRYPOINT)!r})['run'](['true'], 8_000)"
        subprocess.run([*CONTAINER, sys.executable, "-c", program], timeout=TIMEOUT_S, check=True)
        assert time.monotonic() - started < 10, "a second on an idle machine"

    def test_orphans_are_collected(self) -> None:
        script = "(true &); (true &); sleep 0.3; grep -l '^State:.Z' /proc/[0-9]*/status; echo end"
        assert _run("sh", "-c", script, prefix=CONTAINER).stdout == "end\n"

    def test_sigterm_stops_it_like_a_container(self) -> None:
        script = "trap 'exit 5' TERM; echo ready; while :; do sleep 0.05; done"
        with subprocess.Popen([*CONTAINER, *START, "sh", "-c", script], stdout=subprocess.PIPE, text=True) as container:
            assert container.stdout is not None
            assert container.stdout.readline() == "ready\n"
            [first] = Path(f"/proc/{container.pid}/task/{container.pid}/children").read_text().split()
            os.kill(int(first), signal.SIGTERM)
            assert container.wait(TIMEOUT_S) == 5
