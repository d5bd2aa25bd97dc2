"""Figures from records, and what a page says about them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

import pytest

from benchmarks.compare.figures import FIGURES, Goals, figures_of, ratio
from benchmarks.compare.page import write_page
from benchmarks.compare.records import InvalidRecords, Record, read_records
from benchmarks.compare.workloads import SWEEP, Workload

ANSWERS = [
    {"ttft_ms": 100.0, "num_tokens": 3, "itl_ms": [10.0, 30.0]},
    {"ttft_ms": 300.0, "num_tokens": 5, "itl_ms": [100.0, 20.0]},  # pieces of two tokens
]


def load(server: str, name: str, **fields: object) -> Record:
    workload = asdict(Workload(name, 2, 2, 3))
    record = {"record": "load", "server": server, "load": name, "date": "2026-01-01", "workload": workload}
    counted = {"seconds": 2.0, "answers": ANSWERS, "num_failures": 0, "failures": [], "cpu_s": None, "energy_j": None}
    return record | counted | fields


def start(server: str, gpu: str = "H200") -> Record:
    facts = {"machine": {"GPU": gpu}, "environment": {"VLLM_X": "a b"}, "command_line": "python -m benchmarks.compare"}
    spoken = {"version": "1.0", "commands": [f"{server} serve"], "start_s": 2.0, "date": "2026-01-01"}
    return {"record": "start", "server": server} | facts | spoken


def written(file: Path, *records: Record) -> Path:
    file.write_text("".join(f"{json.dumps(each)}\n" for each in records))
    return file


def test_figures() -> None:
    record = load("some", "some", cpu_s=1.0, energy_j=500.0, pictures_per_s=3.0)
    assert figures_of(record, Goals(ttft_ms=150, itl_ms=25)) == {
        "requests_per_s": 1.0,
        "goodput_per_s": 0.5,
        "ttft_p50_ms": 200.0,
        "ttft_p99_ms": pytest.approx(298.0),
        "itl_p50_ms": 25.0,
        "itl_p99_ms": pytest.approx(97.9),
        "token_p50_ms": 25.0,
        "token_max_ms": 30.0,
        "gap_p50_ms": 65.0,
        "gap_max_ms": 100.0,
        "pictures_per_s": 3.0,
        "cpu_s_per_request": 0.5,
        "energy_j_per_request": 250.0,
    }
    assert figures_of(load("some", "some", answers=[]), Goals()) == {}


def test_goodput_needs_both_goals() -> None:
    assert figures_of(load("some", "some"), Goals(ttft_ms=500, itl_ms=25))["goodput_per_s"] == 0.5
    assert figures_of(load("some", "some"), Goals(ttft_ms=50, itl_ms=50))["goodput_per_s"] == 0.0


def test_ratios_are_above_one_where_ours_is_better() -> None:
    by_key = {each.key: each for each in FIGURES}
    assert ratio(by_key["requests_per_s"], 3.0, 2.0) == 1.5
    assert ratio(by_key["ttft_p50_ms"], 3.0, 2.0) == pytest.approx(2 / 3)
    assert ratio(by_key["goodput_per_s"], 0.0, 2.0) == 0.0
    assert ratio(by_key["goodput_per_s"], 2.0, 0.0) == float("inf")
    assert ratio(by_key["goodput_per_s"], 0.0, 0.0) is None


def test_a_page_lists_losses_by_ratio_and_what_was_not_measured(tmp_path: Path) -> None:
    slow, late = {"seconds": 4.0}, [{"ttft_ms": 1000.0, "num_tokens": 1, "itl_ms": []}] * 2
    first = written(tmp_path / "1", start("ours"), load("ours", "a", **slow), load("ours", "b", answers=late))
    second = written(tmp_path / "2", start("theirs"), *(load("theirs", name) for name in "abc"))
    page = write_page(read_records([first, second]), tmp_path / "page", None, None, Goals()).read_text()
    losses = page[page.index("## Where ours loses") : page.index("## In short")]
    rows = [line.split(" | ") for line in losses.splitlines() if line.startswith("| ")][2:]
    assert [float(row[-1].strip("| ")) for row in rows] == sorted(float(row[-1].strip("| ")) for row in rows)
    assert ["| a", "requests/s", "theirs", "0.50", "1.00", "0.50 |"] in rows
    assert ["| b", "goodput, requests/s", "theirs", "0.00", "1.00", "0.00 |"] in rows
    assert "Not measured on ours: c." in losses and "Not measured on theirs" not in losses
    assert "| requests/s | 0.71 | 0 of 2 |" in page
    assert "export VLLM_X='a b'\nours serve" in page


def test_machines_that_differ_are_pointed_out(tmp_path: Path) -> None:
    records = [start("ours"), load("ours", "a"), start("theirs", "H100"), load("theirs", "a")]
    page = write_page(read_records([written(tmp_path / "1", *records)]), tmp_path, None, None, Goals()).read_text()
    assert "**They were not measured on equal machines.**" in page and "| GPU | H200 | H100 |" in page


def test_plots_of_the_sweep(tmp_path: Path) -> None:
    records = [start("ours"), start("theirs")]
    for server in ("ours", "theirs"):
        for in_flight in (1, 4):
            workload = asdict(Workload(f"{SWEEP}{in_flight}", in_flight * 2, in_flight, 3))
            records.append(load(server, f"{SWEEP}{in_flight}", workload=workload))
    page = write_page(read_records([written(tmp_path / "1", *records)]), tmp_path, None, None, Goals()).read_text()
    files = sorted(str(each.relative_to(tmp_path)) for each in tmp_path.rglob("*.png"))
    assert files == ["pictures/comparison_in_flight.png", "pictures/comparison_ratios.png"]
    assert all(f"]({file})" in page for file in files)


def test_the_last_record_of_a_load_stands(tmp_path: Path) -> None:
    failure = {"record": "failure", "server": "some", "date": "d", "during": "start", "error": "e", "log_tail": "t"}
    file = written(tmp_path / "1", failure, start("some"), load("some", "a"), load("some", "a", seconds=1.0))
    results = read_records([file])
    assert results.loads["some", "a"]["seconds"] == 1.0 and not results.failures
    assert read_records([file, written(tmp_path / "2", failure)]).failures["some"].error == "e"


def test_a_load_without_an_answer_was_not_measured(tmp_path: Path) -> None:
    file = written(tmp_path / "1", start("some"), load("some", "a"), load("some", "b", answers=[]))
    assert read_records([file]).measured == {("some", "a")}


def test_lines_that_are_no_records(tmp_path: Path) -> None:
    for line in (
        "{",
        "[]",
        '{"record": "other", "server": "some"}',
        '{"record": "load", "server": "some", "load": "a"}',
    ):
        (tmp_path / "1").write_text(line)
        with pytest.raises(InvalidRecords, match="line 1 is no record of a comparison"):
            read_records([tmp_path / "1"])
