"""The comparison as it is run on a GPU, but of the tiny model on a CPU: servers are started, measured and ended."""

from __future__ import annotations

import json
import re
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.compare.__main__ import main, time_limits
from benchmarks.compare.workloads import quick
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

SERVER = """
name: NAME
processes:
  - name: encoder
    command: ["{python}", -P, -m, vitrine_vlm.encoder_service, --model, "{model}", --load-format, "{load_format}",
              --port, "{encoder_port}"]
  - name: llm
    command: exec {python} -P -m vitrine_vlm.llm_worker --model {model} --load-format {load_format}
      --encoders 127.0.0.1:{encoder_port} --port {port} --grpc-port {grpc_port}
ready: /ready
version: echo "NAME, {model}"
"""
DEAD = """
name: dead
processes:
  - command: "echo 'no such flag: --fast' >&2; exit 3"
"""
SERVERS = {"first": SERVER.replace("NAME", "first"), "dead": DEAD, "second": SERVER.replace("NAME", "second")}
LOADS = ["small", "small, text only"]


class Folder:
    """Where a comparison of three servers was made."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.options = ["--servers"]
        for name, text in SERVERS.items():
            (path / f"{name}.yaml").write_text(text)
            self.options.append(str(path / f"{name}.yaml"))
        self.options += ["--model", str(MODEL_FOLDER), "--small", "--output", str(path / "out")]

    def records(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.path / "out" / "records.jsonl").read_text().splitlines()]

    def page(self) -> str:
        return (self.path / "out" / "comparison.md").read_text()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Folder:
    made = Folder(tmp_path_factory.mktemp("comparison"))
    command = [sys.executable, "-m", "benchmarks.compare", *made.options]
    done = subprocess.run(command, capture_output=True, text=True, timeout=170)
    assert done.returncode == 1, done.stderr  # as one server failed
    assert "dead failed during start: dead ended by itself with exit code 3" in done.stderr
    assert "no such flag: --fast" in done.stderr
    return made


def test_all_loads_are_measured_on_all_servers_that_start(folder: Folder) -> None:
    records = folder.records()
    kinds = ["start", "load", "load", "failure", "start", "load", "load"]
    assert [each["record"] for each in records] == kinds
    loads = [each for each in records if each["record"] == "load"]
    assert [(each["server"], each["load"]) for each in loads] == [
        (server, load) for server in ("first", "second") for load in LOADS
    ]
    for each in loads:
        assert each["num_failures"] == 0, each["failures"]
        assert len(each["answers"]) == 4 and each["seconds"] > 0 and each["cpu_s"] > 0
        assert all(answer["num_tokens"] >= 1 and answer["ttft_ms"] > 0 for answer in each["answers"])
    assert records[0]["version"] == f"first, {MODEL_FOLDER}"
    assert len(records[0]["commands"]) == 2 and records[0]["start_s"] > 0


def test_nothing_listens_any_more(folder: Folder) -> None:
    commands = " ".join(command for each in folder.records() for command in each.get("commands", ()))
    ports = {int(port) for port in re.findall(r"port (\d+)", commands)}
    assert len(ports) == 6
    for port in ports:
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", port), timeout=5)


def test_the_page(folder: Folder) -> None:
    page = folder.page()
    assert page.startswith("# first beside second\n")
    for part in ("## Where first loses", "## Ratios against second", "no such flag: --fast", *LOADS):
        assert part in page
    plot = (folder.path / "out" / "pictures" / "comparison_ratios.png").read_bytes()
    assert plot.startswith(b"\x89PNG") and "](pictures/comparison_ratios.png)" in page


def test_what_was_measured_is_left_out_when_a_comparison_goes_on(
    folder: Folder, capsys: pytest.CaptureFixture[str]
) -> None:
    before = folder.records()
    assert main(folder.options) == 1 and folder.records() == before
    assert "give --resume to add to them" in capsys.readouterr().err
    assert main([*folder.options, "--resume", "--ours", "second", "--baseline", "first"]) == 1
    assert "first: all loads were measured before" in capsys.readouterr().err
    assert [each["record"] for each in folder.records()[len(before) :]] == ["failure"]
    assert folder.page().startswith("# second beside first\n")


def test_pages_of_several_files(folder: Folder, tmp_path: Path) -> None:
    files = []
    for server in ("second", "first"):
        files.append(str(tmp_path / f"{server}.jsonl"))
        lines = [json.dumps(each) for each in folder.records() if each["server"] == server]
        Path(files[-1]).write_text("\n".join(lines))
    assert main(["--from", *files, "--output", str(tmp_path)]) == 0
    assert (tmp_path / "comparison.md").read_text().startswith("# second beside first\n")


def test_no_load_is_begun_when_time_is_up(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*folder.options, "--output", str(tmp_path), "--stop-after-s", "1e-9", "--no-page"]) == 1
    assert capsys.readouterr().err.count("no time left for 2 loads") == 3
    assert not (tmp_path / "records.jsonl").exists()


def test_what_cannot_be_done_is_said(folder: Folder, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*folder.options, "--list"]) == 0
    assert [line.split(":")[0].split(maxsplit=1)[1] for line in capsys.readouterr().out.splitlines()] == LOADS
    (tmp_path / "unknown.yaml").write_text("name: unknown\nprocesses: [{command: 'serve {fast}'}]")
    for options, message in (
        ([*folder.options, "--loads", "7"], "there is no load 7: they are 0 to 1"),
        (["--servers", folder.options[1], folder.options[1]], "two servers have the same name: first, first"),
        (["--servers", "fast"], "there is no file fast"),
        (["--servers", str(tmp_path / "unknown.yaml")], "unknown: {fast} has no value"),
        (["--from", str(tmp_path / "none")], "No such file"),
    ):
        assert main([*options, "--output", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err


def test_a_quick_comparison_takes_five_minutes() -> None:
    selection = quick()
    limits = time_limits(len(selection) * 3, quick=True, budget_s=None)
    assert len(selection) * 3 * (limits.warm_up_s + limits.load_s) < 300
    assert time_limits(10, quick=False, budget_s=100).load_s == pytest.approx(6)
    assert time_limits(10, quick=False, budget_s=None).load_s == 30
