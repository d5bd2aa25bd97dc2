"""What the images of deploy/docker start, and their environment: read from the Dockerfile, found on this machine."""

from __future__ import annotations

import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path

from tests.helm.test_images import environment, stage

_ROOT = Path(__file__).parents[2]
_SCRIPTS = Path(sys.prefix) / "bin"
# Of the image → of this machine.
_FILES = {
    "/usr/bin/python3": str(_SCRIPTS / "python"),
    "/opt/entrypoint.py": str(_ROOT / "deploy" / "docker" / "entrypoint.py"),
}
_TARGETS = ("encoder", "llm", "gateway")
# What a container needs of this machine, wherever its volumes are: the project, and the interpreter with its packages.
HOST_FOLDERS = sorted({str(_ROOT), sys.prefix, sys.base_prefix})


@dataclass(frozen=True)
class Image:
    """entrypoint: the command, to which a container's arguments are added. env: of the image."""

    entrypoint: list[str]
    env: dict[str, str]


def image_of(reference: str) -> Image:
    """Returns the image that REGISTRY/vitrine-TARGET:TAG stands for.

    Raises:
        LookupError: no target of the Dockerfile is called that. The node could not pull it.
    """
    match = re.search(r"/vitrine-(\w+):[^/]+$", reference)
    if match is None or match[1] not in _TARGETS:
        raise LookupError(f"ErrImagePull: {reference} is none of {', '.join(_TARGETS)}")
    text = stage(match[1])
    entrypoint = json.loads(re.findall(r"(?m)^ENTRYPOINT (.+)$", text)[-1])
    env = environment(text) | {"PATH": f"{_SCRIPTS}:/usr/local/bin:/usr/bin:/bin"}
    del env["PYTHONPATH"]  # the environment that has the packages here has the project, too
    return Image([_FILES.get(word, word) for word in entrypoint], env)
