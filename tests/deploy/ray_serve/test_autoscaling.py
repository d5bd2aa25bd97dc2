"""The policy alone, and inside what Ray Serve wraps around it."""

from __future__ import annotations

from typing import Any

import pytest

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from vitrine_vlm.deploy.ray_serve.autoscaling import QueuedWork

DEPLOYMENT = DeploymentID(name="Encoder", app_name="vitrine")


def context(
    now: int, queues: list[float] | None, state: dict[str, Any] | None = None, downscale_delay_s: float = 0.0
) -> AutoscalingContext:
    """`now` replicas that report these queues, in seconds; None: none has reported."""
    replicas = [ReplicaID(str(index), DEPLOYMENT) for index in range(now)]
    metrics = {} if queues is None else {"queue_seconds": dict(zip(replicas, queues, strict=False))}
    return AutoscalingContext(
        deployment_id=DEPLOYMENT,
        deployment_name="Encoder",
        app_name="vitrine",
        current_num_replicas=now,
        target_num_replicas=now,
        running_replicas=replicas,
        total_num_requests=0,
        total_queued_requests=0,
        aggregated_metrics=metrics,
        raw_metrics={},
        capacity_adjusted_min_replicas=1,
        capacity_adjusted_max_replicas=8,
        policy_state=state or {},
        last_scale_up_time=None,
        last_scale_down_time=None,
        current_time=None,
        config=AutoscalingConfig(
            min_replicas=1, max_replicas=8, upscale_delay_s=0, downscale_delay_s=downscale_delay_s
        ),
    )


@pytest.mark.parametrize(
    ("now", "queues", "wanted"),
    [
        (1, [1.9], 1),  # under the target of two seconds
        (1, [2.1], 2),
        (1, [9.0], 5),  # as many as it takes, at once
        (2, [3.0, 6.0], 5),
        (3, [6.5], 4),  # two that have just come and not reported count, but bring no queue
        (4, [2.0, 2.0, 2.0, 2.0], 4),
        (4, [1.0, 1.0, 1.0, 1.0], 4),  # two could do it, but only just
        (4, [0.4, 0.5, 0.5, 0.5], 2),
        (4, [0.0, 0.0, 0.0, 0.0], 1),
        (3, None, 3),
    ],
)
def test_as_many_replicas_as_have_the_target_each(now: int, queues: list[float] | None, wanted: int) -> None:
    policy = QueuedWork("queue_seconds", 2.0)
    in_ray_serve = _apply_autoscaling_config(policy)
    assert in_ray_serve(context(now, queues))[0] == wanted


@pytest.mark.parametrize(
    ("loads", "wanted"),
    [
        ([0.7, 0.7, 0.7, 0.7], 4),  # short queues, and yet none is to spare
        ([0.6, 0.6, 0.6, 0.6], 4),  # 3.4 are enough, but only just
        ([0.3, 0.3, 0.3, 0.3], 2),
        ([0.9, 0.9, 0.9, 0.9], 6),
        ([0.0, 0.0, 0.0, 0.0], 1),
    ],
)
def test_no_more_replicas_are_removed_than_the_load_allows(loads: list[float], wanted: int) -> None:
    policy = QueuedWork("queue_seconds", 2.0, "load", 0.7)
    given = context(4, [0.01] * 4)
    assert given.aggregated_metrics is not None
    given.aggregated_metrics["load"] = dict(zip(given.running_replicas, loads, strict=True))
    assert _apply_autoscaling_config(policy)(given)[0] == wanted


def test_other_statistics_do_not_count() -> None:
    assert QueuedWork("queued_prefill_tokens", 100.0)(context(2, [50.0, 50.0])) == (2, {})


def test_a_queue_that_swings_around_the_target_changes_nothing() -> None:
    policy = QueuedWork("queue_seconds", 2.0)
    decided = [policy(context(3, [seconds] * 3))[0] for seconds in (1.4, 1.9, 1.2, 2.0)]
    assert decided == [3, 3, 3, 3]


def test_replicas_go_only_after_an_unbroken_time_of_quiet(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = 1000.0
    monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: clock)
    policy = _apply_autoscaling_config(QueuedWork("queue_seconds", 2.0))
    state: dict[str, Any] = {}
    decided = []
    for seconds in (0.0, 0.0, 3.0, 0.0, 0.0, 0.0, 0.0):  # of queue on each of two replicas, every 10 s
        number, state = policy(context(2, [seconds] * 2, state, downscale_delay_s=25.0))
        decided.append(number)
        clock += 10.0
    assert decided == [2, 2, 3, 2, 2, 2, 1]
