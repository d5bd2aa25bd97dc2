"""The page of a comparison, as Markdown, with plots beside it."""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path

from benchmarks.compare.comparison import Comparison
from benchmarks.compare.figures import Goals
from benchmarks.compare.plots import save_plots
from benchmarks.compare.records import Results, Start
from benchmarks.compare.workloads import SWEEP

_IN_SHORT = ("requests_per_s", "goodput_per_s", "ttft_p50_ms", "itl_p50_ms", "itl_p99_ms", "gap_max_ms", "token_p50_ms")

_METHOD = """\
Requests are streamed over HTTP on loopback, a number of them in flight: when one answer ends, the next request is sent.
A picture is a JPEG of random detail, drawn before the load from a seed, and sent once unless the load repeats some;
text is random. In front of each load others of its kind warm the server up. A load ends when all its requests were
answered or, if that takes too long, with the answers in flight then: the tables say how many answers there were.

TTFT is from sending a request to the first piece of its answer; ITL from one piece to the next, over all streams. A
stream's mean a token is the time from its first to its last piece by its tokens but one, its largest gap the longest
wait between two pieces: percentiles of pieces do not show a few gaps of seconds. CPU is that of all processes of the
server, energy that of the whole GPU, idle power included."""
_GOALS = (
    "Goodput counts answers with a TTFT of up to {goals.ttft_ms:g} ms and a mean of up to {goals.itl_ms:g} ms a token."
)


def write_page(results: Results, folder: Path, ours: str | None, baseline: str | None, goals: Goals) -> Path:
    """Writes comparison.md and its plots into the folder; returns the page's file.

    Raises:
        ValueError: nothing was measured, or not on these servers.
    """
    comparison = Comparison(results, ours, baseline, goals)
    folder.mkdir(parents=True, exist_ok=True)
    plots = save_plots(comparison, folder)
    parts = [
        _head(comparison),
        _losses(comparison),
        _in_short(comparison),
        _plots(plots),
        _all_figures(comparison),
        _ratios(comparison),
        _failures(comparison),
        _servers(comparison),
        _how(comparison),
    ]
    page = folder / "comparison.md"
    page.write_text("\n\n".join(part for part in parts if part) + "\n")
    return page


def _head(comparison: Comparison) -> str:
    dates = sorted(record["date"] for record in comparison.results.loads.values())
    gpus = sorted({start.machine["GPU"] for start in _last_starts(comparison).values()})
    beside = f" beside {' and '.join(comparison.others)}" if comparison.others else ""
    where = "without a GPU" if gpus == ["none"] else f"on the same GPU ({', '.join(gpus)})"
    return (
        f"# {comparison.ours}{beside}\n\n"
        f"{len(comparison.load_names)} loads, each server alone {where}, from {dates[0]} to {dates[-1]}.\n"
        "`python -m benchmarks.compare` wrote this page ([how](#how-it-was-measured))."
    )


def _losses(comparison: Comparison) -> str:
    ours = comparison.ours
    lines = [f"## Where {ours} loses"]
    if not comparison.others:
        return "\n\n".join([*lines, "It was measured alone."])
    losses = comparison.losses()
    rows = [
        [
            loss.load,
            loss.figure.title,
            loss.other,
            _shown(loss.ours, loss.figure.digits),
            _shown(loss.theirs, loss.figure.digits),
            _shown_ratio(loss.ratio),
        ]
        for loss in losses
    ]
    if rows:
        lines += [
            "Every figure in which another server is better, the worst ratio first.",
            _table(["load", "figure", "against", ours, "theirs", "ratio"], rows),
        ]
    else:
        lines.append("In no figure at no load that both were measured with.")
    for load in comparison.load_names:
        record = comparison.results.loads.get((ours, load))
        if record is not None and record["num_failures"]:
            lines.append(f"{load}: {record['num_failures']} requests failed.")
    return "\n\n".join([*lines, *_not_measured(comparison)])


def _not_measured(comparison: Comparison) -> list[str]:
    """Returns a line for each server that some load was not measured on."""
    lines = []
    for server in comparison.servers:
        missing = [load for load in comparison.load_names if (server, load) not in comparison.results.loads]
        if missing:
            lines.append(f"Not measured on {server}: {'; '.join(missing)}.")
    return lines


def _in_short(comparison: Comparison) -> str:
    rows = []
    for other in comparison.others:
        for figure in comparison.figures(_IN_SHORT):
            if mean := comparison.mean_ratio(figure, comparison.ours, other):
                rows.append([other, figure.title, _shown_ratio(mean[0]), f"{mean[1]} of {mean[2]}"])
    if not rows:
        return ""
    text = (
        f"How many times better {comparison.ours} is: the geometric mean over all loads, and at how many it is ahead."
    )
    return "\n\n".join(["## In short", text, _table(["against", "figure", "times better", "ahead at"], rows)])


def _plots(plots: Sequence[tuple[str, str]]) -> str:
    parts = [f"{caption}\n\n![{caption}]({file})" for file, caption in plots]
    return "\n\n".join(["## Plots", *parts]) if parts else ""


def _all_figures(comparison: Comparison) -> str:
    figures = comparison.figures()
    head = ["load", "server", *(figure.title for figure in figures), "answers", "failures"]
    parts = ["## All figures"]
    for title, loads in _by_kind(comparison):
        rows = []
        for load in loads:
            for server in comparison.servers:
                if record := comparison.results.loads.get((server, load)):
                    values = [_shown(comparison.value(server, load, each), each.digits) for each in figures]
                    rows.append([load, server, *values, str(len(record["answers"])), str(record["num_failures"])])
        parts += [title, _table(head, rows)]
    return "\n\n".join(parts)


def _ratios(comparison: Comparison) -> str:
    baseline = comparison.baseline
    compared = [each for each in comparison.servers if each != baseline]
    if not compared:
        return ""
    figures = comparison.figures()
    rows = [
        [load, server, *(_shown_ratio(comparison.ratio(each, load, server, baseline)) for each in figures)]
        for load in comparison.load_names
        for server in compared
        if (server, load) in comparison.results.loads
    ]
    text = f"How many times better than {baseline} a server is: above 1 it is ahead, whether more or less is better."
    titles = [figure.plain_title for figure in figures]
    return "\n\n".join([f"## Ratios against {baseline}", text, _table(["load", "server", *titles], rows)])


def _failures(comparison: Comparison) -> str:
    lines = []
    for failure in comparison.results.failures.values():
        lines.append(f"{failure.server}, {failure.date}, during {failure.during}: {failure.error}")
        lines.append(failure.log_tail)
    for (server, load), record in comparison.results.loads.items():
        lines += [f"{server}, {load}: {reason}" for reason in record["failures"]]
    return "\n".join(["## What failed\n", "```", *lines, "```"]) if lines else ""


def _servers(comparison: Comparison) -> str:
    parts = ["## Servers"]
    starts = _last_starts(comparison)
    for server in comparison.servers:
        start = starts[server]
        all_starts = ", ".join(f"{each.start_s:.0f}" for each in comparison.results.starts[server])
        version = ", ".join((start.version or "not known").split("\n"))
        parts.append(f"**{server}**: {version}; ready after {all_starts} s")
        environment = [f"export {name}={shlex.quote(value)}" for name, value in start.environment.items()]
        commands = "\n".join([*environment, " &\n".join(start.commands)])
        parts.append(f"```\n{commands}\n```")
    facts = list(dict.fromkeys(fact for start in starts.values() for fact in start.machine))
    rows = [
        [fact, *_one_if_equal([starts[each].machine.get(fact, "") for each in comparison.servers])] for fact in facts
    ]
    same = all(len(row) == 2 for row in rows)
    if not same:
        parts.append("**They were not measured on equal machines.**")
        rows = [[row[0], *(row[1:] if len(row) > 2 else row[1:] * len(comparison.servers))] for row in rows]
    parts.append(_table(["", *(["machine"] if same else comparison.servers)], rows))
    return "\n\n".join(parts)


def _how(comparison: Comparison) -> str:
    commands = dict.fromkeys(start.command_line for starts in comparison.results.starts.values() for start in starts)
    goals = _GOALS.format(goals=comparison.goals)
    return "\n\n".join(["## How it was measured", "```\n" + "\n".join(commands) + "\n```", _METHOD, goals])


def _last_starts(comparison: Comparison) -> dict[str, Start]:
    return {server: starts[-1] for server, starts in comparison.results.starts.items()}


def _by_kind(comparison: Comparison) -> Iterable[tuple[str, list[str]]]:
    fixed = [load for load in comparison.load_names if not load.startswith(SWEEP)]
    sweep = [load for load in comparison.load_names if load.startswith(SWEEP)]
    kinds = [
        ("### Fixed loads", fixed),
        ("### The sweep: pictures a request and their size, requests in flight, answer", sweep),
    ]
    return [kind for kind in kinds if kind[1]]


def _one_if_equal(values: Sequence[str]) -> Sequence[str]:
    return values[:1] if len(set(values)) == 1 else values


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _shown(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"


def _shown_ratio(ratio: float | None) -> str:
    if ratio is None:
        return ""
    return "∞" if ratio == float("inf") else f"{ratio:.2f}"
