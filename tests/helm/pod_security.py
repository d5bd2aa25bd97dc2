"""The Restricted profile of the Pod Security Standards, which includes Baseline.

Source: Kubernetes documentation, Concepts, Security, "Pod Security Standards".
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

_VOLUMES = {"configMap", "csi", "downwardAPI", "emptyDir", "ephemeral", "persistentVolumeClaim", "projected", "secret"}
_SECCOMP = {"RuntimeDefault", "Localhost"}


def violations(pod: dict[str, Any]) -> list[str]:
    """What of a pod's spec the Restricted profile forbids."""
    return [*_of_pod(pod), *(found for each in _containers(pod) for found in _of_container(each, pod))]


def _containers(pod: dict[str, Any]) -> Iterator[dict[str, Any]]:
    for key in ("initContainers", "containers", "ephemeralContainers"):
        yield from pod.get(key, [])


def _of_pod(pod: dict[str, Any]) -> Iterator[str]:
    context = pod.get("securityContext", {})
    for key in ("hostNetwork", "hostPID", "hostIPC"):
        if pod.get(key):
            yield key
    for volume in pod.get("volumes", []):
        if forbidden := volume.keys() - {"name"} - _VOLUMES:
            yield f"volume {volume['name']}: {', '.join(forbidden)}"
    for key in ("sysctls", "seLinuxOptions", "appArmorProfile", "windowsOptions"):
        if context.get(key):  # some of their values are allowed; the chart has no need of any
            yield key


def _of_container(container: dict[str, Any], pod: dict[str, Any]) -> Iterator[str]:
    context = container.get("securityContext", {})
    effective = {**pod.get("securityContext", {}), **context}
    capabilities = context.get("capabilities", {})
    problems = {
        "privileged": context.get("privileged"),
        "allowPrivilegeEscalation": context.get("allowPrivilegeEscalation") is not False,
        "capabilities.drop": "ALL" not in capabilities.get("drop", []),
        "capabilities.add": set(capabilities.get("add", [])) - {"NET_BIND_SERVICE"},
        "procMount": context.get("procMount", "Default") != "Default",
        "seLinuxOptions": context.get("seLinuxOptions"),
        "appArmorProfile": context.get("appArmorProfile"),
        "runAsNonRoot": effective.get("runAsNonRoot") is not True,
        "runAsUser": effective.get("runAsUser") == 0,
        "seccompProfile": effective.get("seccompProfile", {}).get("type") not in _SECCOMP,
        "hostPort": any(port.get("hostPort") for port in container.get("ports", [])),
        "host of a probe or hook": any(_names_host(container.get(key)) for key in ("lifecycle", *_PROBES)),
    }
    yield from (f"{container['name']}: {name}" for name, found in problems.items() if found)


_PROBES = ("startupProbe", "readinessProbe", "livenessProbe")


def _names_host(action: Any) -> bool:
    if not isinstance(action, dict):
        return False
    return any(key == "host" or _names_host(value) for key, value in action.items())
