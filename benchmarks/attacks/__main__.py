"""Attacks real services while a victim sends small pictures and texts, and prints how long the victim waits.

    OMP_NUM_THREADS=1 python -m benchmarks.attacks [NAME...] [--through gateway]

All of them take 22 minutes, and as long again through the gateway. The lines are those of docs/reliability.md. Several
may run at once, each on cores of its own (taskset), as ports are free ones.

Starts an encoder, an LLM worker and a gateway with the shipped model. Before each attack the victim is alone for a
time, then the attack runs beside it. An attack is a function of `over_http`, `over_grpc` or `by_media`; without names
all run, one after the other. Attackers have an address and a process of their own, which gets what the services leave
of their cores (SCHED_IDLE), or cores of its own.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from benchmarks.attacks.attacker import ATTACKS
from benchmarks.attacks.memory import peak_mib, reset_peaks, resident_mib
from benchmarks.attacks.victim import Victim, Waits
from benchmarks.line_process import LineProcess
from benchmarks.soak.services import Services
from vitrine_vlm.deploy.launcher.ask import served_model
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER

_WARM_UP_S, _SETTLE_S = 5.0, 8.0
_COLUMNS = ("text", "picture", "health")
_HEAD = (
    "attack",
    "text: p50, p99 ms",
    "picture",
    "/health",
    "text, picture: p99 times",
    "encoder: peak, left MiB",
    "worker",
    "gateway",
    "victim's failures",
    "attacker",
)


async def attacked(name: str, services: Services, url: str, options: argparse.Namespace) -> str:
    """Returns a line of the table: what the victim waited without the attack, and with it.

    Raises:
        RuntimeError: the attacker ended.
    """
    model = await served_model(url)
    victim = Victim(url, model, options.every_s)
    watched = [services.encoders[0], services.workers[0], services.gateway]
    target = (name, url, services.encoder_addresses[0], model, *options.attacker_cores)
    async with LineProcess.started("benchmarks.attacks.attacker", *target) as attacker:
        await attacker.read_line()
        before = await victim.run(options.seconds)
        pids = [service.pid for service in watched]
        reset_peaks(pids)
        await attacker.send_line("begin")
        beside = await victim.run(options.seconds)
        await attacker.send_line("end")
        outcomes = json.loads(await attacker.read_line())
    await asyncio.sleep(_SETTLE_S)
    memory = [f"{peak_mib(pid):.0f}, {resident_mib(pid):.0f}" for pid in pids]
    failures = _counts(before.failures + beside.failures)
    cells = [
        f"`{name}`: {_title(name)}",
        *(_times(kind, before, beside) for kind in _COLUMNS),
        ", ".join(f"{_ratio(kind, before, beside):.1f}" for kind in ("text", "picture")),
        *memory,
        failures or "none",
        _counts(outcomes),
    ]
    return f"| {' | '.join(cells)} |"


def _title(name: str) -> str:
    """What the attack sends, as its docstring says."""
    return (ATTACKS[name].__doc__ or "").partition("\n")[0].rstrip(".")


def _times(kind: str, before: Waits, beside: Waits) -> str:
    return " → ".join(
        f"{each.percentile_ms(kind, 50):.0f}, {each.percentile_ms(kind, 99):.0f}" for each in (before, beside)
    )


def _ratio(kind: str, before: Waits, beside: Waits) -> float:
    return beside.percentile_ms(kind, 99) / before.percentile_ms(kind, 99)


def _counts(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} x {text}" for text, count in counts.items())


async def run(options: argparse.Namespace, logs: Path) -> None:
    """
    Raises:
        ServiceEnded: a service did not start.
    """
    running = Services.running(options.model, 1, 1, logs, ["--trust-request-chat-template"])
    async with running as services:
        url = services.url if options.through == "gateway" else services.worker_urls[0]
        await Victim(url, await served_model(url), options.every_s).run(_WARM_UP_S)
        print(f"| {' | '.join(_HEAD)} |\n{'|---' * len(_HEAD)}|", flush=True)
        for name in options.names or ATTACKS:
            print(await attacked(name, services, url, options), flush=True)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", help=f"attacks: {', '.join(ATTACKS)}; default: all")
    parser.add_argument("--through", choices=("worker", "gateway"), default="worker", help="where HTTP is sent to")
    parser.add_argument(
        "--seconds", type=float, default=30.0, help="without, and with the attack; default: %(default)s"
    )
    parser.add_argument("--every-s", type=float, default=0.5, help="the victim's period; default: %(default)s")
    parser.add_argument(
        "--attacker-cores", nargs="*", default=(), metavar="CORE", help="numbers; default: those of the services"
    )
    parser.add_argument("--model", type=Path, default=MODEL_FOLDER, help="checkpoint folder; default: the shipped one")
    parser.add_argument("--logs", type=Path, help="folder for the services' output; default: a temporary one")
    options = parser.parse_args(arguments)
    if unknown := set(options.names) - set(ATTACKS):
        parser.error(f"no such attacks: {', '.join(sorted(unknown))}")
    with tempfile.TemporaryDirectory() as scratch:
        logs = options.logs or Path(scratch)
        logs.mkdir(parents=True, exist_ok=True)
        asyncio.run(run(options, logs))
    return 0


if __name__ == "__main__":
    with suppress(KeyboardInterrupt):
        sys.exit(main())
