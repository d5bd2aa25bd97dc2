"""Autoscalers as the chart sets them do not take away what is needed, and their rules are Kubernetes' and Ray's."""

from __future__ import annotations

import random
from typing import Any, get_args

import pytest

from vitrine_vlm.simulation.what_must_hold.hpa import Direction, HorizontalPodAutoscaler, Metric, Rate

pytest.importorskip("ray", reason="Ray is not installed: it comes with the extra `serve`")

from ray.serve._private.common import DeploymentID, ReplicaID
from ray.serve.autoscaling_policy import _apply_autoscaling_config
from ray.serve.config import AutoscalingConfig, AutoscalingContext

from vitrine_vlm.deploy.ray_serve.autoscaling import QueuedWork
from vitrine_vlm.deploy.ray_serve.config import EncoderPool
from vitrine_vlm.simulation.what_must_hold.autoscaling import LOAD, QUEUE, SHORT, failures, run_scaled
from vitrine_vlm.simulation.what_must_hold.chart import Kind, setting
from vitrine_vlm.simulation.what_must_hold.ray_rule import RayAutoscaler


@pytest.mark.parametrize("kind", get_args(Kind))
def test_pods_follow_the_work_and_none_is_taken_away_that_is_needed(kind: Kind) -> None:
    assert failures(run_scaled(kind, SHORT)) == []


def test_by_the_queue_alone_they_are() -> None:
    assert "had to be started again" in " ".join(failures(run_scaled("hpa", SHORT, by_queue_alone=True)))


def test_the_rules_are_the_charts() -> None:
    for kind in ("hpa", "keda"):
        scaler = setting(kind).autoscaler(2, 9)
        assert isinstance(scaler, HorizontalPodAutoscaler)
        assert [(each.name, each.target) for each in scaler.metrics] == [(QUEUE, 1.0), (LOAD, 0.7)]


def hpa(target: float = 1.0, **options: Direction) -> HorizontalPodAutoscaler:
    return HorizontalPodAutoscaler(1, 100, [Metric("queue", target)], **options)


@pytest.mark.parametrize(
    ("num_pods", "reported", "wanted"),
    [
        (4, [2.0] * 4, 8),
        (4, [1.05] * 4, 4),  # within the tolerance
        (10, [9.0] * 10, 20),  # doubled within 15 s at most
        (1, [9.0], 5),  # or four more, whichever is more
        (10, [2.0] * 5, 10),  # five that start count as idle
        (10, [3.0] * 5, 15),
        (10, [], 10),
    ],
)
def test_growing(num_pods: int, reported: list[float], wanted: int) -> None:
    assert hpa().decide(0.0, num_pods, {"queue": reported}) == wanted


def test_pods_that_start_count_with_their_target_where_fewer_are_wanted() -> None:
    scaler = HorizontalPodAutoscaler(1, 100, [Metric("queue", 1.0)], down=Direction(0.0, (Rate(100, 15.0, True),)))
    assert scaler.decide(0.0, 10, {"queue": [0.1] * 5}) == 6
    assert scaler.decide(15.0, 6, {"queue": [0.1] * 6}) == 1


def test_pods_go_once_nothing_in_the_window_wanted_them() -> None:
    scaler, num_pods, numbers = hpa(), 10, []
    for sync in range(24):
        num_pods = scaler.decide(15.0 * sync, num_pods, {"queue": [1.0 if sync == 0 else 0.1] * num_pods})
        numbers.append(num_pods)
    assert numbers[:21] == [10] * 21 and numbers[21:] == [1] * 3


def test_the_largest_wish_counts() -> None:
    metrics = [Metric("queue", 1.0, is_external=True), Metric("load", 0.7, is_external=True)]
    scaler = HorizontalPodAutoscaler(1, 100, metrics, down=Direction(0.0, (Rate(100, 15.0, True),)))
    assert scaler.decide(0.0, 10, {"queue": [0.0] * 10, "load": [0.35] * 10}) == 5


def test_ray_decides_as_the_simulation_does(monkeypatch: pytest.MonkeyPatch) -> None:
    """An hour of queues and loads that change at random, look-back of one reading."""
    pool = EncoderPool(min_replicas=2, max_replicas=40, look_back_s=0.5, upscale_delay_s=5.0, downscale_delay_s=60.0)
    ours = RayAutoscaler(pool)
    policy = QueuedWork("queue_seconds", pool.target_queue_s, "load", pool.target_load)
    theirs = _apply_autoscaling_config(policy)
    config = AutoscalingConfig(
        min_replicas=2,
        max_replicas=40,
        upscale_delay_s=5.0,
        downscale_delay_s=60.0,
        look_back_period_s=0.5,
        metrics_interval_s=0.1,
    )
    rng, number, state, now, busy = random.Random(1), 4, dict[str, Any](), 0.0, 0.3
    monkeypatch.setattr("ray.serve.autoscaling_policy.time.time", lambda: now)
    deployment = DeploymentID(name="Encoder", app_name="vitrine")
    seen = set()
    for step in range(3600):
        now = float(step)
        if step % 90 == 0:
            busy = rng.choice([0.02, 0.3, 3.0])
        queues, loads = [busy] * number, [min(1.0, busy * rng.uniform(0.9, 1.1))] * number
        replicas = [ReplicaID(str(index), deployment) for index in range(number)]
        context = AutoscalingContext(
            deployment_id=deployment,
            deployment_name="Encoder",
            app_name="vitrine",
            current_num_replicas=number,
            target_num_replicas=number,
            running_replicas=replicas,
            total_num_requests=0,
            total_queued_requests=0,
            aggregated_metrics={
                "queue_seconds": dict(zip(replicas, queues, strict=True)),
                "load": dict(zip(replicas, loads, strict=True)),
            },
            raw_metrics={},
            capacity_adjusted_min_replicas=2,
            capacity_adjusted_max_replicas=40,
            policy_state=state,
            last_scale_up_time=None,
            last_scale_down_time=None,
            current_time=None,
            config=config,
        )
        wanted, state = theirs(context)
        wanted = min(max(int(wanted), 2), 40)  # what calls the policy keeps the range
        assert ours.decide(now, number, queues, loads) == wanted, f"step {step}, {number} replicas"
        number = wanted
        seen.add(number)
    assert len(seen) > 5
