"""The measurement of the whole split, as it is run on a GPU but at small dims: real processes, one table."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import torch

from tests.deploy.proc import children_of, is_running

COMMAND = [sys.executable, "-m", "benchmarks.serving", "--small"]


def test_a_table_of_figures_comes_out() -> None:
    finished = subprocess.run(COMMAND, capture_output=True, text=True, timeout=150)
    assert finished.returncode == 0, finished.stderr
    head, _, *lines = finished.stdout.splitlines()
    assert head == "| figure | bar | measured |"
    figures = {figure: measured for figure, _, measured in (line.strip("| ").split(" | ") for line in lines)}
    assert figures.pop("transport of rows") == ("cuda_ipc" if torch.cuda.is_available() else "shm")
    for figure, measured in figures.items():
        numbers = [float(number) for number in measured.split(" / ")]
        if figure.endswith("failures"):
            assert numbers == [0.0], finished.stderr
        else:
            assert min(numbers) > 0.0, figure
            assert numbers == sorted(numbers), "a 99th percentile below the median"
    names = "\n".join(figures)
    for part in ("requests/s", "TTFT, ms", "2 decoding streams: ITL", "in flight: ITL", "with pictures / without"):
        assert part in names
    assert len([figure for figure in figures if figure.endswith("failures")]) == 2


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_services_end_with_it() -> None:
    with subprocess.Popen(COMMAND, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if "[llm]" in line and "LISTENING" in line:
                break
        children = children_of(process.pid)
        assert len(children) == 3, "encoder, worker and the pictures that pour in"
        process.kill()
        process.stderr.read()
    deadline = time.monotonic() + 15.0
    while any(map(is_running, children)):
        assert time.monotonic() < deadline, "a service outlived the benchmark"
        time.sleep(0.05)


def test_a_service_that_does_not_start_ends_it() -> None:
    command = [*COMMAND, "--worker-flags", "max-num-seqs=0"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=150)
    assert finished.returncode == 1
    assert finished.stderr.splitlines()[-1].startswith("llm ended with exit code 2")
    assert not finished.stdout
