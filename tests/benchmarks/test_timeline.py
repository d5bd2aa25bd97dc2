"""The timeline of both halves: gaps and their causes, and a run of real services on a CPU."""

from __future__ import annotations

import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from benchmarks.compare.server_file import ServerSpec
from benchmarks.timeline.__main__ import recorded, uses_device
from benchmarks.timeline.gaps import Gap, busy_s, gaps_between, kinds_of, on_the_same_device, overlap_s
from benchmarks.timeline.recorder import Recorder
from benchmarks.timeline.span import Kind, Span, read_spans, write_spans
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER


def span(kind: Kind, launched_s: float, begin_s: float, end_s: float, device: str = "cpu", num_tokens: int = 1) -> Span:
    return Span(kind, num_tokens, launched_s, launched_s + 1, begin_s, end_s, device)


def test_gaps_have_a_cause() -> None:
    steps = [
        span("decode", 0, 0, 10),
        span("mixed", 9, 10, 20),  # in time
        span("mixed", 23, 26, 30),  # the host was late, then the device had not begun
        span("prompts", 35, 35, 40),  # there may have been nothing to compute
        span("decode", 36, 44, 50),  # launched long before
    ]
    assert gaps_between(steps) == [
        Gap(20, 23, "launched late"),
        Gap(23, 26, "launched, not begun"),
        Gap(30, 35, "launched late, or nothing to compute"),
        Gap(40, 44, "launched, not begun"),
    ]
    assert busy_s(steps) == 35 and busy_s(steps) + busy_s(gaps_between(steps)) == 50


def test_overlaps_are_counted_once_on_the_same_device() -> None:
    steps = [span("decode", 0, 0, 10), span("mixed", 9, 10, 20), span("decode", 21, 24, 30)]
    batches = [span("batch", 0, 5, 12), span("batch", 5, 19, 26)]
    elsewhere = [span("batch", 0, 0, 30, device="another")]
    spans = {"llm": steps, "encoder": batches, "other encoder": elsewhere}
    assert on_the_same_device("llm", spans) == batches
    assert on_the_same_device("other encoder", spans) == []
    assert overlap_s(steps, batches) == overlap_s(batches, steps) == 5 + 2 + 1 + 2
    assert overlap_s(gaps_between(steps), batches) == 4


def test_figures_by_kind() -> None:
    steps = [span("decode", 0, 0, 10, num_tokens=2), span("mixed", 9, 10, 20, num_tokens=600)]
    steps += [span("decode", 20, 20, 21, num_tokens=4)]
    decode, mixed = kinds_of(steps, [span("batch", 0, 15, 20)])
    assert (decode.kind, decode.count, decode.num_tokens, decode.alone_ms, decode.shared) == ("decode", 2, 3, 5500, 0)
    assert (mixed.kind, mixed.shared, mixed.shared_ms, mixed.alone_ms) == ("mixed", 1, 10_000, 0)
    assert (decode.host_bound, mixed.host_bound) == (1, 0)  # the last one has ended when it was launched


def test_spans_are_read_back(tmp_path: Path) -> None:
    spans = [span("mixed", 0.5, 1.25, 2.5), span("batch", 0, 0.5, 1), span("decode", 3, 3, 4)]
    write_spans(tmp_path / "spans", spans)
    assert read_spans(tmp_path / "spans", 0.0, 3.0) == [spans[1], spans[0]]


@pytest.mark.parametrize(
    ("server", "computing", "other"),
    [("two_gpus/prefill_decode", ["encoder", "prefill", "decode"], "gateway"), ("vitrine", ["encoder", "llm"], "mps")],
)
def test_all_that_computes_is_recorded(tmp_path: Path, server: str, computing: list[str], other: str) -> None:
    processes = ServerSpec.read(server).processes
    assert [each.name for each in processes if uses_device(each)] == computing
    changed = recorded(processes, {name: tmp_path / name for name in computing})
    same = {each.name: each == was for each, was in zip(changed, processes, strict=True)}
    assert same == dict.fromkeys(computing, False) | {other: True}


def test_both_halves_of_a_running_server_are_recorded(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks.timeline", "--small", "--model", str(MODEL_FOLDER)]
    done = subprocess.run([*command, "--output", str(tmp_path)], capture_output=True, text=True, timeout=170)
    assert done.returncode == 0, done.stderr
    assert ", 0 failures, " in done.stdout
    assert (tmp_path / "timeline.md").read_text() in done.stdout
    steps, batches = (read_spans(tmp_path / f"{name}.jsonl", 0.0, time.monotonic()) for name in ("llm", "encoder"))
    assert {"decode", "prompts"} <= {each.kind for each in steps}
    assert {each.kind for each in batches} == {"batch"}
    for each in (*steps, *batches):
        assert 0 <= each.launched_s <= each.returned_s and each.begin_s < each.end_s and each.num_tokens > 0
    assert all(before.end_s <= after.begin_s for before, after in pairwise(steps))


def test_a_process_that_records_nothing_leaves_no_spans_of_an_earlier_run(tmp_path: Path) -> None:
    file = tmp_path / "encoder.jsonl"
    write_spans(file, [span("batch", 0, 0, 1)])
    service = [sys.executable, "-m", "benchmarks.timeline.recorded_service", str(file), "vitrine_vlm.encoder_service"]
    subprocess.run([*service, "--model", str(MODEL_FOLDER), "--print-config"], check=True, capture_output=True)
    assert read_spans(file, 0.0, 1.0) == []


@pytest.mark.gpu
def test_times_of_a_gpu_are_the_hosts() -> None:
    recorder, device = Recorder(), torch.device("cuda")
    factor = torch.randn(4096, 4096, device=device)
    torch.mm(factor, factor)
    recorder.use(device)
    for _ in range(20):
        launched_s, start = time.monotonic(), recorder.event()
        torch.mm(factor, factor)
        recorder.add("mixed", 1, launched_s, time.monotonic(), start, recorder.event())
        time.sleep(0.01)
    spans, end_s = recorder.spans(), time.monotonic()
    for each in spans:
        assert each.launched_s - 1e-3 < each.begin_s < each.end_s < end_s
    assert all(before.end_s < after.begin_s for before, after in pairwise(spans))
