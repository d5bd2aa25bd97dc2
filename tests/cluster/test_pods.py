"""One pod's life, with small programs in place of the services."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from tests.cluster.pods import Pod, PodRunner
from tests.cluster.volumes import Objects

# Of this process, as tests run side by side.
ADDRESS = f"127.63.{os.getpid() // 250 % 250}.{os.getpid() % 250 + 1}"
# Process 1 has no handlers but its own.
TERMINATES = "import signal, sys; signal.signal(signal.SIGTERM, lambda *_: sys.exit(7));"
WAITS = "import time; time.sleep(60)"
LISTENS = f"import socket; server = socket.create_server(('{ADDRESS}', 8000));"


def container(code: str, name: str = "main", **fields: Any) -> dict[str, Any]:
    image = "registry.example.com/vitrine-encoder:1"
    return {"name": name, "image": image, "command": ["python", "-c", code]} | fields


@asynccontextmanager
async def running(folder: Path, spec: dict[str, Any], objects: Objects | None = None) -> AsyncIterator[PodRunner]:
    """Deletes the pod at the end of the context and waits for its end."""
    objects = objects or Objects("media", {}, b"the CA", folder / "hosts")
    objects.hosts.write_text("127.0.0.1 localhost\n")
    spec = {"automountServiceAccountToken": False, "terminationGracePeriodSeconds": 20} | spec
    metadata = {"labels": {}, "annotations": {"vitrine/config": "host: all"}}
    runner = PodRunner(Pod("pod", "set", "node", ADDRESS, metadata, spec), objects, folder / "pod", 0.02)
    task = asyncio.create_task(runner.run())
    try:
        yield runner
    finally:
        runner.delete()
        await task


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.01)


async def test_a_container_has_its_volumes_and_writes_to_nothing_else(pods_folder: Path) -> None:
    objects = Objects("media", {"KUBERNETES_SERVICE_HOST": "127.0.0.1"}, b"the CA", pods_folder / "hosts")
    objects.tokens["workers"] = "the token"
    objects.secrets["keys"] = {"keys.yaml": "the key", "other": "not mounted"}
    code = (
        """
import os
from pathlib import Path
account = Path("/var/run/secrets/kubernetes.io/serviceaccount")
print(*((account / name).read_text() for name in ("token", "namespace", "ca.crt")))
print(Path("/etc/vitrine/config/config.yaml").read_text(), os.listdir("/keys"), Path("/etc/hosts").read_text())
print(os.environ["ADDRESS"], os.environ["KEY"], os.environ["VITRINE_ENCODER_HOST"], os.environ.get("OF_HARNESS"))
print(os.getpid(), Path("/tmp/from-init").read_text())
for path in ("/root.txt", "/etc/vitrine/config/more", "/keys/more"):
    try:
        Path(path).write_text("")
    except OSError as error:
        print(error.strerror)
"""
        + TERMINATES
        + "print('done', flush=True);"
        + WAITS
    )
    mounts = [("config", "/etc/vitrine/config", True), ("keys", "/keys", True), ("tmp", "/tmp", False)]
    main = container(
        code,
        env=[
            {"name": "ADDRESS", "valueFrom": {"fieldRef": {"fieldPath": "status.podIP"}}},
            {"name": "KEY", "valueFrom": {"secretKeyRef": {"name": "keys", "key": "keys.yaml"}}},
        ],
        volumeMounts=[{"name": name, "mountPath": path, "readOnly": only} for name, path, only in mounts],
        securityContext={"readOnlyRootFilesystem": True},
    )
    init = container("open('/tmp/from-init', 'w').write('made by init')", "init", volumeMounts=main["volumeMounts"])
    volumes = [
        {
            "name": "config",
            "downwardAPI": {
                "items": [{"path": "config.yaml", "fieldRef": {"fieldPath": "metadata.annotations['vitrine/config']"}}]
            },
        },
        {"name": "keys", "secret": {"secretName": "keys", "items": [{"key": "keys.yaml", "path": "keys.yaml"}]}},
        {"name": "tmp", "emptyDir": {}},
    ]
    spec = {
        "automountServiceAccountToken": True,
        "serviceAccountName": "workers",
        "volumes": volumes,
        "initContainers": [init],
        "containers": [main],
    }
    log = pods_folder / "pod.log"
    async with running(pods_folder, spec, objects):
        await until(lambda: log.exists() and "done" in log.read_text())
    assert log.read_text().splitlines() == [
        "the token media the CA",
        "host: all ['keys.yaml'] 127.0.0.1 localhost",
        "",
        f"{ADDRESS} the key {ADDRESS} None",
        "1 made by init",
        *["Read-only file system"] * 3,
        "done",
    ]


async def test_the_end_is_pre_stop_then_sigterm(pods_folder: Path) -> None:
    pre_stop = {"preStop": {"sleep": {"seconds": 0.3}}}
    probe = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
    spec = {"containers": [container(TERMINATES + LISTENS + WAITS, lifecycle=pre_stop, readinessProbe=probe)]}
    async with running(pods_folder, spec) as runner:
        await until(lambda: runner.pod.ready)
        begin = time.monotonic()
        runner.delete()
        assert not runner.pod.is_available
        await asyncio.sleep(0.2)
        assert runner.pod.ready, "it serves until SIGTERM"
    (end,) = runner.pod.ends
    assert (end.status, end.asked, end.killed) == (7, True, False)
    assert time.monotonic() - begin > 0.3
    assert not runner.pod.ready


async def test_what_does_not_end_in_its_grace_period_is_killed(pods_folder: Path) -> None:
    code = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN);" + LISTENS + WAITS
    probe = {"tcpSocket": {"port": 8000}, "periodSeconds": 1}
    spec = {"terminationGracePeriodSeconds": 0.5, "containers": [container(code, readinessProbe=probe)]}
    async with running(pods_folder, spec) as runner:
        await until(lambda: runner.pod.ready)
    (end,) = runner.pod.ends
    assert end.killed and end.status == 137


async def test_a_container_that_ends_or_never_starts_is_started_again(pods_folder: Path) -> None:
    startup = {"tcpSocket": {"port": 8000}, "periodSeconds": 1, "failureThreshold": 60}
    ends = container("import sys; sys.exit(3)", "ends")
    hangs = container(TERMINATES + WAITS, "hangs", startupProbe=startup)
    spec = {"terminationGracePeriodSeconds": 1, "containers": [ends, hangs]}
    async with running(pods_folder, spec) as runner:
        await until(lambda: {end.container for end in runner.pod.ends} == {"ends", "hangs"})
        assert not runner.pod.ready
        await until(lambda: runner.pod.num_restarts >= 2)
    assert {(end.container, end.status, end.asked) for end in runner.pod.ends[:2]} >= {("ends", 3, False)}
    assert ("hangs", 7, True) in {(end.container, end.status, end.asked) for end in runner.pod.ends}


async def test_a_container_that_is_killed_comes_back_and_one_that_is_not_alive_is_restarted(pods_folder: Path) -> None:
    # Its port closes when the file is there. The next start removes it before it listens: a pod that is ready has no
    # such file until the test makes one.
    code = (
        TERMINATES
        + "import os, time\nif os.path.exists('/tmp/close'): os.remove('/tmp/close')\n"
        + LISTENS
        + "\nwhile not os.path.exists('/tmp/close'): time.sleep(0.01)\nserver.close(); time.sleep(60)"
    )
    probe = {"tcpSocket": {"port": 8000}, "periodSeconds": 1, "failureThreshold": 2}
    mounts = [{"name": "tmp", "mountPath": "/tmp"}]
    main = container(code, startupProbe=probe | {"failureThreshold": 500}, readinessProbe=probe, volumeMounts=mounts)
    main["livenessProbe"] = probe
    volumes = [{"name": "tmp", "emptyDir": {}}]
    async with running(pods_folder, {"containers": [main], "volumes": volumes}) as runner:
        await until(lambda: runner.pod.ready)
        runner.kill()
        await until(lambda: not runner.pod.ready)
        await until(lambda: runner.pod.ready)
        (pods_folder / "pod" / "volumes" / "tmp" / "close").touch()
        await until(lambda: not runner.pod.ready)
        await until(lambda: runner.pod.ready)
    assert [(end.status, end.asked) for end in runner.pod.ends] == [(137, False), (7, True), (7, True)]
