"""One pod's life on its node: init containers, start, probes, restarts, preStop, SIGTERM, grace, SIGKILL."""

from __future__ import annotations

import asyncio
import time
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.cluster.containers import Container, ContainerSpec, Mount
from tests.cluster.images import image_of
from tests.cluster.probes import Probe
from tests.cluster.volumes import Objects, make_volumes, mounts_of, mounts_of_kubelet

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 10.0, 300.0
_ANY = "0.0.0.0"


@dataclass
class End:
    """A container's end.

    served: whether the pod had been ready. asked: whether SIGTERM was sent. killed: whether it did not end in the grace
    period.
    """

    container: str
    status: int
    served: bool
    asked: bool
    killed: bool


@dataclass
class Pod:
    """A pod, as the API has it.

    owner: the ReplicaSet's name. address: on the loopback network, its own.
    ready: whether it is in Services. num_restarts: of its containers. ends: of its containers so far.
    """

    name: str
    owner: str
    node: str
    address: str
    metadata: dict[str, Any]
    spec: dict[str, Any]
    created: float = field(default_factory=time.monotonic)
    terminating: bool = False
    ready: bool = False
    num_restarts: int = 0
    ends: list[End] = field(default_factory=list)

    @property
    def labels(self) -> dict[str, str]:
        labels: dict[str, str] = self.metadata["labels"]
        return labels

    @property
    def is_available(self) -> bool:
        return self.ready and not self.terminating

    def ports(self) -> dict[str, int]:
        """Numbers of the containers' ports by name."""
        return {
            port["name"]: port["containerPort"] for each in self.spec["containers"] for port in each.get("ports", [])
        }


class PodRunner:
    """Runs one pod until it is deleted.

    Args:
        folder: for volumes and roots.
        time_scale: what periods of probes and waits before restarts are multiplied with.
    """

    def __init__(self, pod: Pod, objects: Objects, folder: Path, time_scale: float) -> None:
        self.pod = pod
        self._objects = objects
        self._folder = folder
        self._time_scale = time_scale
        self._deleted = asyncio.Event()
        self._running: dict[str, Container] = {}
        self._ready: dict[str, bool] = {}
        self._served = False
        self._num_starts = 0

    def delete(self) -> None:
        """Begins the pod's end."""
        self.pod.terminating = True
        self._deleted.set()

    def kill(self) -> None:
        """SIGKILL to the service's container, which is the first."""
        self._running[self.pod.spec["containers"][0]["name"]].kill()

    async def run(self) -> None:
        """Returns once all containers have ended after `delete`.

        Raises:
            KeyError, ValueError: the pod has something that is not there, or not known here.
        """
        spec = self.pod.spec
        (self._folder / "volumes").mkdir(parents=True)
        annotations = self.pod.metadata.get("annotations", {})
        volumes = make_volumes(spec, annotations, self._folder / "volumes", self._objects)
        added = mounts_of_kubelet(spec, self._folder, self._objects)
        self._ready = {container["name"]: False for container in spec["containers"]}
        try:
            for container in spec.get("initContainers", []):
                if not await self._initialize(container, volumes, added):
                    return
            async with asyncio.TaskGroup() as group:
                for container in spec["containers"]:
                    group.create_task(self._keep_running(container, volumes, added))
        finally:
            for running in self._running.values():
                running.kill()

    async def _initialize(self, container: dict[str, Any], volumes: dict[str, Path], added: list[Mount]) -> bool:
        """Runs an init container until it succeeds; returns whether it did before the pod was deleted."""
        backoff_s = _FIRST_BACKOFF_S
        while not self._deleted.is_set():
            running = await self._start(container, volumes, added)
            if await self._until_deleted(running.wait()) == 0:
                return True
            running.kill()
            await self._until_deleted(asyncio.sleep(backoff_s * self._time_scale))
            backoff_s = min(2 * backoff_s, _MAX_BACKOFF_S)
        return False

    async def _keep_running(self, container: dict[str, Any], volumes: dict[str, Path], added: list[Mount]) -> None:
        name, backoff_s = container["name"], 0.0
        while not self._deleted.is_set():
            running = await self._start(container, volumes, added)
            ended = asyncio.create_task(running.wait())
            probing = asyncio.create_task(self._probe(container))
            deleted = asyncio.create_task(self._deleted.wait())
            done, _ = await asyncio.wait({ended, probing, deleted}, return_when=asyncio.FIRST_COMPLETED)
            asked = ended not in done
            if asked:
                await self._end(container, running, ended)
            else:
                self.pod.ends.append(End(name, await ended, self._served, asked=False, killed=False))
            self._set_ready(name, False)
            for task in (probing, deleted):
                task.cancel()
            with suppress(asyncio.CancelledError):
                await probing
            if not self._deleted.is_set():
                self.pod.num_restarts += 1
                await self._until_deleted(asyncio.sleep(backoff_s * self._time_scale))
                backoff_s = min(max(2 * backoff_s, _FIRST_BACKOFF_S), _MAX_BACKOFF_S)

    async def _end(self, container: dict[str, Any], running: Container, ended: asyncio.Task[int]) -> None:
        """preStop, SIGTERM and, once the grace period is over, SIGKILL; the grace period begins with preStop."""
        grace_s = self.pod.spec.get("terminationGracePeriodSeconds", 30)
        killed = False
        try:
            async with asyncio.timeout(grace_s):
                if action := container.get("lifecycle", {}).get("preStop"):
                    await asyncio.sleep(action["sleep"]["seconds"])
                running.terminate()
                await asyncio.shield(ended)
        except TimeoutError:
            killed = True
            running.kill()
        self.pod.ends.append(End(container["name"], await ended, self._served, asked=True, killed=killed))

    async def _probe(self, container: dict[str, Any]) -> None:
        """Returns when the container must be restarted: it did not start in time, or is not alive."""
        probes = {
            kind: Probe.of(container[kind], self.pod.address, self.pod.ports(), self._time_scale)
            for kind in ("startupProbe", "readinessProbe", "livenessProbe")
            if kind in container
        }
        if startup := probes.get("startupProbe"):
            async for started in startup.results():
                if not started:
                    return
                break
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(self._watch_readiness(container["name"], probes.get("readinessProbe")))
            await _until_dead(probes.get("livenessProbe"))
            watching.cancel()

    async def _watch_readiness(self, name: str, probe: Probe | None) -> None:
        if probe is None:
            self._set_ready(name, True)
            return
        async for ready in probe.results():
            self._set_ready(name, ready)

    def _set_ready(self, container: str, ready: bool) -> None:
        self._ready[container] = ready
        self.pod.ready = all(self._ready.values())
        self._served |= self.pod.ready

    async def _start(self, container: dict[str, Any], volumes: dict[str, Path], added: list[Mount]) -> Container:
        name = container["name"]
        image = image_of(container["image"])
        command = container.get("command", image.entrypoint) + container.get("args", [])
        read_only = container.get("securityContext", {}).get("readOnlyRootFilesystem", False)
        spec = ContainerSpec(command, self._env(container, image.env), mounts_of(container, volumes, added), read_only)
        self._num_starts += 1
        folder = self._folder / f"{name}-{self._num_starts}"
        folder.mkdir()
        pods_folder = self._folder.parent
        self._running[name] = await Container.start(spec, folder, pods_folder, pods_folder / f"{self.pod.name}.log")
        return self._running[name]

    def _env(self, container: dict[str, Any], of_image: dict[str, str]) -> dict[str, str]:
        # All pods share one network: a service that listened on all addresses would listen on those of other pods.
        env = {key: self.pod.address if value == _ANY else value for key, value in of_image.items()}
        env |= {"HOSTNAME": self.pod.name} | self._objects.env
        for each in container.get("env", []):
            env[each["name"]] = each["value"] if "value" in each else self._env_from(each["valueFrom"])
        return env

    def _env_from(self, source: dict[str, Any]) -> str:
        if source.get("fieldRef", {}).get("fieldPath") == "status.podIP":
            return self.pod.address
        if reference := source.get("secretKeyRef"):
            return self._objects.secrets[reference["name"]][reference["key"]]
        raise ValueError(f"environment variable from {source}: not known here")

    async def _until_deleted(self, awaitable: Any) -> Any:
        """Returns the result, or None if the pod is deleted first."""
        task, deleted = asyncio.ensure_future(awaitable), asyncio.create_task(self._deleted.wait())
        done, pending = await asyncio.wait({task, deleted}, return_when=asyncio.FIRST_COMPLETED)
        for each in pending:
            each.cancel()
        return task.result() if task in done else None


async def _until_dead(liveness: Probe | None) -> None:
    """Returns when the probe fails; never without one."""
    if liveness is None:
        await asyncio.Event().wait()
    else:
        async for alive in liveness.results():
            if not alive:
                return
