"""Every pod passes the Restricted profile, but for folders of the node that were asked for; and the check can fail."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helm.pod_security import violations
from tests.helm.rendering import VALUES, pod_templates, rendered


@pytest.mark.parametrize("values", sorted(VALUES.keys() - {"host-path"}))
def test_all_pods_are_restricted(values: str) -> None:
    pods = list(pod_templates(rendered(values)))
    assert pods
    for pod in pods:
        assert violations(pod.spec) == [], pod.name


def test_folders_of_the_node_are_the_only_exception() -> None:
    for pod in pod_templates(rendered("host-path")):
        assert violations(pod.spec) == ["volume cache: hostPath", "volume shm: hostPath"]


@pytest.mark.parametrize("values", VALUES)
def test_root_file_systems_are_read_only_and_what_is_written_has_a_volume(values: str) -> None:
    for pod in pod_templates(rendered(values)):
        assert pod.container["securityContext"]["readOnlyRootFilesystem"] is True
        mounts = {mount["mountPath"]: mount["name"] for mount in pod.container["volumeMounts"]}
        assert "/tmp" in mounts
        if pod.program != "gateway":  # which keeps nothing
            assert "/cache" in mounts
            assert pod.env["HOME"] == "/cache"
            assert pod.env["HF_HOME"].startswith("/cache/")
        volumes = [volume["name"] for volume in pod.spec["volumes"]]
        assert set(mounts.values()) == set(volumes)
        assert len(set(volumes)) == len(volumes)


@pytest.mark.parametrize(
    ("change", "found"),
    [
        ({"hostIPC": True}, "hostIPC"),
        ({"volumes": [{"name": "v", "hostPath": {"path": "/"}}]}, "volume v: hostPath"),
        ({"securityContext": {}}, "c: runAsNonRoot"),
        ({"securityContext": {"runAsNonRoot": True}}, "c: seccompProfile"),
        ({"containers": [{"name": "c"}]}, "c: allowPrivilegeEscalation"),
    ],
)
def test_the_check_sees_what_is_forbidden(change: dict[str, Any], found: str) -> None:
    pod = {
        "securityContext": {"runAsNonRoot": True, "seccompProfile": {"type": "RuntimeDefault"}},
        "containers": [
            {
                "name": "c",
                "securityContext": {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}},
            }
        ],
    }
    assert violations(pod) == []
    assert found in violations(pod | change)
