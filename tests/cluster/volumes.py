"""A pod's volumes as folders, and what a kubelet adds to them: the account's token, the hosts."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.containers import Mount

_ACCOUNT = "/var/run/secrets/kubernetes.io/serviceaccount"


@dataclass
class Objects:
    """What pods refer to, by name: the data of Secrets, the folders of claims, tokens of accounts.

    env: what every container has. ca: of the API server, PEM. hosts: the file that resolves the names of Services.
    """

    namespace: str
    env: dict[str, str]
    ca: bytes
    hosts: Path
    tokens: dict[str, str] = field(default_factory=dict)
    secrets: dict[str, dict[str, str]] = field(default_factory=dict)
    claims: dict[str, Path] = field(default_factory=dict)


def make_volumes(
    spec: dict[str, Any], annotations: Mapping[str, str], folder: Path, objects: Objects
) -> dict[str, Path]:
    """Makes the folders of a pod's volumes; returns them by the volumes' names.

    Args:
        annotations: the pod's.

    Raises:
        KeyError: what a volume refers to is not there.
        ValueError: a kind of volume that is not known here.
    """
    found: dict[str, Path] = {}
    for volume in spec.get("volumes", []):
        name = volume["name"]
        (kind,) = set(volume) - {"name"}
        source = volume[kind]
        found[name] = folder / name
        if kind == "persistentVolumeClaim":
            found[name] = objects.claims[source["claimName"]]
        elif kind == "emptyDir":
            found[name].mkdir()
        elif kind == "downwardAPI":
            _write(found[name], {each["path"]: _annotation(each, annotations) for each in source["items"]}, None)
        elif kind == "secret":
            _write(found[name], objects.secrets[source["secretName"]], source.get("items"))
        else:
            raise ValueError(f"volume {name}: {kind} is not known here")
    return found


def mounts_of(container: dict[str, Any], volumes: Mapping[str, Path], added: list[Mount]) -> list[Mount]:
    """Returns a container's mounts, those of a folder before those inside of it.

    Raises:
        ValueError: a mount of a part of a volume, which is not known here.
    """
    mounts = list(added)
    for mount in container.get("volumeMounts", []):
        if unknown := set(mount) - {"name", "mountPath", "readOnly"}:
            raise ValueError(f"mount {mount['mountPath']}: {sorted(unknown)} are not known here")
        mounts.append(Mount(str(volumes[mount["name"]]), mount["mountPath"], mount.get("readOnly", False)))
    return sorted(mounts, key=lambda mount: mount.path)


def mounts_of_kubelet(spec: dict[str, Any], folder: Path, objects: Objects) -> list[Mount]:
    """Returns the mounts that every container of a pod has besides its own."""
    mounts = [Mount(str(objects.hosts), "/etc/hosts", True)]
    if spec.get("automountServiceAccountToken", True):
        token = objects.tokens[spec["serviceAccountName"]]
        account = folder / "serviceaccount"
        _write(account, {"token": token, "namespace": objects.namespace, "ca.crt": objects.ca.decode()}, None)
        mounts.append(Mount(str(account), _ACCOUNT, True))
    return mounts


def _annotation(item: dict[str, Any], annotations: Mapping[str, str]) -> str:
    path = item["fieldRef"]["fieldPath"]
    match = re.fullmatch(r"metadata\.annotations\['(.+)'\]", path)
    if match is None:
        raise ValueError(f"file {item['path']}: {path} is not known here")
    return annotations[match[1]]


def _write(folder: Path, data: Mapping[str, str], items: list[dict[str, str]] | None) -> None:
    folder.mkdir()
    wanted = {each["path"]: each["key"] for each in items} if items is not None else {key: key for key in data}
    for path, key in wanted.items():
        (folder / path).write_text(data[key])
