"""The records of a comparison: JSON lines in a file, from which pages are written, also from those of several runs."""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from benchmarks.compare.measuring import Measurement
from benchmarks.compare.running_server import RunningServer, shown_command
from benchmarks.compare.server_file import ServerSpec
from benchmarks.compare.workloads import Workload

_SHOWN_FAILURES = 3

Record = dict[str, Any]


class InvalidRecords(ValueError):
    """A line of a file is no record."""


@dataclass(frozen=True)
class Start:
    """A start of a server that ended with the server being ready."""

    date: str
    version: str | None
    commands: list[str]
    start_s: float
    machine: dict[str, str]
    environment: dict[str, str]
    command_line: str


@dataclass(frozen=True)
class Failure:
    """A server ended by itself or was not ready in time. during: the start, or the name of a load."""

    server: str
    date: str
    during: str
    error: str
    log_tail: str


@dataclass(frozen=True)
class Results:
    """What the records of one or several files say. Of a load that was measured more than once the last stands.

    starts: of each server, in the order in which they were made.
    loads: records by server and load.
    failures: those behind which nothing of that server was measured.
    """

    starts: dict[str, list[Start]] = field(default_factory=dict)
    loads: dict[tuple[str, str], Record] = field(default_factory=dict)
    failures: dict[str, Failure] = field(default_factory=dict)

    @property
    def servers(self) -> list[str]:
        """The names of all servers that were measured, in order of appearance."""
        return list(dict.fromkeys(server for server, _ in self.loads))

    @property
    def measured(self) -> frozenset[tuple[str, str]]:
        """Servers and loads with an answer at least: where all requests failed, the load is still to be measured."""
        return frozenset(key for key, record in self.loads.items() if record["answers"])

    @property
    def load_names(self) -> list[str]:
        """The names of all loads, in order of appearance."""
        return list(dict.fromkeys(load for _, load in self.loads))


def start_record(spec: ServerSpec, server: RunningServer, version: str | None, facts: Record) -> Record:
    """Returns the record of a server that is ready. facts: `machine`, `environment` and `command_line` of the run."""
    commands = [shown_command(each) for each in spec.processes]
    start = {"commands": commands, "version": version, "start_s": round(server.start_s, 1)}
    return {"record": "start", "server": spec.name, "date": now(), **start, **facts}


def failure_record(failure: Failure) -> Record:
    return {"record": "failure", **asdict(failure)}


def load_record(server: str, workload: Workload, measured: Measurement) -> Record:
    """Returns the record of a load: what was sent, and of each answer when its tokens came, milliseconds."""
    load = measured.load
    record: Record = {
        "record": "load",
        "server": server,
        "load": workload.name,
        "date": now(),
        "workload": asdict(workload),
        "seconds": round(load.seconds, 4),
        "answers": [
            {
                "ttft_ms": round(each.ttft_s * 1e3, 2),
                "num_tokens": each.num_tokens,
                "itl_ms": [round(gap_s * 1e3, 2) for gap_s in each.itl_s],
            }
            for each in load.answers
        ],
        "num_failures": len(load.failures),
        "failures": load.failures[:_SHOWN_FAILURES],
        "cpu_s": measured.cpu_s,
        "energy_j": measured.energy_j,
    }
    if measured.beside:
        record["pictures_per_s"] = measured.beside.requests_per_s
        record["num_failures"] += len(measured.beside.failures)
        record["failures"] += measured.beside.failures[:_SHOWN_FAILURES]
    return record


def read_records(files: Iterable[Path]) -> Results:
    """Reads files of records.

    Raises:
        InvalidRecords: a line is no record.
        OSError: a file cannot be read.
    """
    results = Results()
    for file in files:
        for number, line in enumerate(file.read_text().splitlines(), start=1):
            try:
                _add(results, json.loads(line))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRecords(f"{file}, line {number} is no record of a comparison: {error!r}") from error
    return results


def _add(results: Results, record: Record) -> None:
    kind, server = record.pop("record"), record["server"]
    if kind == "failure":
        results.failures[server] = Failure(**record)
        return
    if kind == "load":
        if server not in results.starts:
            raise ValueError(f"a load of {server}, which was not started")
        results.loads[server, record["load"]] = record
    elif kind == "start":
        del record["server"]
        results.starts.setdefault(server, []).append(Start(**record))
    else:
        raise ValueError(f"unknown kind {kind!r}")
    results.failures.pop(server, None)


def now() -> str:
    return datetime.now(UTC).strftime("%Y-%m-%d %H:%M:%S UTC")


def command_line(arguments: Sequence[str]) -> str:
    return shlex.join(["python", "-m", "benchmarks.compare", *arguments])
