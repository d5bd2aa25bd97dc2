"""A process that attacks: prints "ready", attacks from a line on stdin to the next, prints what came of it as JSON."""

from __future__ import annotations

import asyncio
import json
import os
import resource
import sys

from benchmarks.attacks import by_media, over_grpc, over_http
from benchmarks.attacks.target import Attack, Target

ATTACKS: dict[str, Attack] = {
    attack.__name__: attack
    for attack in (
        over_http.text,
        over_http.messages,
        over_http.tools,
        over_http.bodies,
        over_http.data_urls,
        over_http.gzip_bodies,
        over_http.half_sent,
        over_http.template,
        by_media.many_scans,
        by_media.scans,
        by_media.segments,
        by_media.chunks,
        by_media.pixels,
        by_media.video,
        over_grpc.unread,
        over_grpc.malformed,
        over_grpc.sessions,
    )
}


async def main(name: str, target: Target) -> None:
    attack = ATTACKS[name](target)
    print("ready", flush=True)
    await asyncio.to_thread(sys.stdin.readline)
    task = asyncio.ensure_future(attack())
    line = asyncio.create_task(asyncio.to_thread(sys.stdin.readline))
    await asyncio.wait([task, line], return_when=asyncio.FIRST_COMPLETED)
    if task.done():
        task.result()  # it ends by an error only
    print(json.dumps(target.outcomes), flush=True)
    os._exit(0)  # calls in flight are cut, as a client that is killed cuts them


if __name__ == "__main__":
    # Attackers usually have machines of their own: here they have what the services leave, or cores of their own.
    os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    attack_name, url, encoder, model, *cores = sys.argv[1:]
    if cores:
        os.sched_setaffinity(0, map(int, cores))
    asyncio.run(main(attack_name, Target(url, encoder, model)))
