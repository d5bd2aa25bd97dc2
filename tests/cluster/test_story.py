"""The rendered chart run for real, under load, in short: probes ask ten times as often, preStop sleeps a second.

`make cluster` runs all of it, with the times that are rendered.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from pathlib import Path

import pytest

from tests.cluster.cluster import Cluster
from tests.cluster.report import faults, table
from tests.cluster.story import Release, values_here
from tests.helm.rendering import NAMESPACE


@pytest.mark.timeout(400)  # it starts seven services, on a machine that may be busy
async def test_users_notice_nothing_of_what_happens_to_a_release(pods_folder: Path) -> None:
    # What starts may take as long as without that, as the machine may be busy.
    values = values_here(startupTimeoutSeconds=6000) | {"preStopSleepSeconds": 1}
    async with Cluster.running(NAMESPACE, pods_folder, time_scale=0.1, lag_s=0.3) as cluster:
        release = await Release.installed(cluster, values)
        async with release.users(2, 0.2) as users:
            await release.scale_encoders(2)
            changes = {"llm": {"defaults": {"config": {"max_num_seqs": 8}}}}
            await asyncio.gather(release.lose_pod("encoder"), release.upgrade(changes))
            (worker,) = cluster.of_component("llm")
            (other,) = {"node-a", "node-b"} - {worker.node}
            drained = [pod for pod in cluster.of_component("encoder") if pod.node == other]
            await asyncio.gather(release.drain(other), release.roll_back())
            await release.scale_encoders(1)
            left = list(cluster.pods)
    assert drained and not any(pod in left for pod in drained)
    assert faults(users.outcomes, cluster.ends) == [], table(release.events, users.outcomes)
    # Both workers that were replaced, the encoders that were drained, and one that was too many.
    ended = Counter(end.container for end in cluster.ends if end.asked)
    assert ended == {"llm": 2, "encoder": len(drained) + 1}
    for event in release.events[1:]:
        assert any(event.begin < each.at < event.end for each in users.outcomes), f"no request during {event.name}"
