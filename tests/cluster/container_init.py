"""Process 1 of a container, first of all: gives it a root and volumes of its own, then becomes the container's command.

    unshare --mount --pid --fork python -I container_init.py SPEC.json

The root is an overlay over the host's, so that the host's interpreter and packages take the place of the image's
layers. What the container writes stays in the overlay, or in its volumes.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

_PODS = "/.pods"
_HOST = "/.host"
_SHM_NBYTES = 64 << 20  # of /dev/shm, where no volume is mounted there: the default of container runtimes


def main() -> None:
    spec = json.loads(Path(sys.argv[1]).read_text())
    root, pods = Path(spec["folder"]) / "root", spec["pods_folder"]
    layers = {name: Path(spec["folder"]) / name for name in ("upper", "work")}
    for folder in (root, *layers.values()):
        folder.mkdir()
    _mount(
        "-t", "overlay", "overlay", "-o", f"lowerdir=/,upperdir={layers['upper']},workdir={layers['work']}", str(root)
    )
    _mount("--rbind", "/dev", f"{root}/dev")
    _mount("-t", "proc", "proc", f"{root}/proc")
    Path(f"{root}{_PODS}").mkdir()
    _mount("--bind", pods, f"{root}{_PODS}")
    for number, folder in enumerate(spec["host_folders"]):
        Path(f"{root}{_HOST}{number}").mkdir()
        _mount("--rbind", folder, f"{root}{_HOST}{number}")
    os.chroot(root)
    os.chdir("/")
    _mount("-t", "tmpfs", "-o", f"size={_SHM_NBYTES}", "tmpfs", "/dev/shm")
    for mount in spec["mounts"]:
        _mount_volume(mount["path"], _PODS + mount["source"].removeprefix(pods), mount["read_only"])
    # After the volumes, as one of them may lie above such a folder: /tmp.
    for number, folder in enumerate(spec["host_folders"]):
        os.makedirs(folder, exist_ok=True)
        _mount("--rbind", f"{_HOST}{number}", folder)
        _unmount(f"{_HOST}{number}")
    _unmount(_PODS)
    if spec["read_only"]:
        _mount("-o", "remount,ro", "/")
    os.execvpe(spec["command"][0], spec["command"], spec["env"])


def _mount_volume(path: str, source: str, read_only: bool) -> None:
    if os.path.isdir(source):
        os.makedirs(path, exist_ok=True)
    elif not os.path.exists(path):
        os.makedirs(os.path.dirname(path), exist_ok=True)
        Path(path).touch()
    _mount("--bind", source, path)
    if read_only:
        _mount("-o", "remount,bind,ro", path)


def _unmount(path: str) -> None:
    subprocess.run(["umount", "--lazy", path], check=True)


def _mount(*arguments: str) -> None:
    subprocess.run(["mount", *arguments], check=True)


if __name__ == "__main__":
    main()
