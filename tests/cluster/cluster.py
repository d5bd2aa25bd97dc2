"""A cluster of one machine: objects are applied, and controllers and kubelets bring about what they say."""

from __future__ import annotations

import asyncio
import os
import ssl
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from ipaddress import IPv4Address
from pathlib import Path
from typing import Any

import trustme

from tests.cluster.deployments import Deployment
from tests.cluster.disruptions import may_evict
from tests.cluster.pods import End, Pod, PodRunner
from tests.cluster.services import ServiceResolver, endpoint_slice, ready_addresses, write_hosts
from tests.cluster.volumes import Objects
from tests.embedding_transport.fleet.discovery.slice_server import SliceServer

_TICK_S = 0.1
_EVICTION_RETRY_S = 0.5
# Kinds that are objects for others here, or do nothing in a cluster of this kind.
_INERT = {"ConfigMap", "ServiceAccount", "NetworkPolicy", "Ingress"}
_HOOK = "helm.sh/hook"


class NotSettled(RuntimeError):
    """What was applied did not come about in time."""


class Cluster:
    """Create it with `running`.

    resolver: of the names of Services, for clients outside of the pods. pods: that there are.
    ends: of all containers of pods that are gone.
    """

    def __init__(
        self, namespace: str, folder: Path, objects: Objects, slices: SliceServer, time_scale: float, lag_s: float
    ) -> None:
        self.pods: list[Pod] = []
        self.ends: list[End] = []
        self.resolver = ServiceResolver(lag_s)
        self._namespace = namespace
        self._folder = folder
        self._objects = objects
        self._slices = slices
        self._time_scale = time_scale
        self._nodes = {"node-a": True, "node-b": True}  # and whether pods may be put there
        self._deployments: dict[str, Deployment] = {}
        self._services: dict[str, dict[str, Any]] = {}
        self._budgets: list[dict[str, Any]] = []
        self._runners: dict[str, PodRunner] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._num_pods = 0
        # Of no other process of this machine that runs a cluster at the same time, or hardly ever.
        self._first_address = IPv4Address(f"127.{64 + os.getpid() // 256 % 128}.{os.getpid() % 256}.1")
        self._published: dict[str, list[dict[str, Any]]] = {}

    @classmethod
    @asynccontextmanager
    async def running(
        cls, namespace: str, folder: Path, time_scale: float = 1.0, lag_s: float = 1.0
    ) -> AsyncIterator[Cluster]:
        """Ends all pods at once at the end of the context.

        Args:
            folder: for all that pods have and write. time_scale: see `PodRunner`. lag_s: see `ServiceResolver`.
        """
        authority = trustme.CA()
        tls = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
        authority.issue_cert("127.0.0.1").configure_cert(tls)
        async with SliceServer.running(namespace, tls) as slices:
            env = {"KUBERNETES_SERVICE_HOST": "127.0.0.1", "KUBERNETES_SERVICE_PORT": str(slices.port)}
            objects = Objects(namespace, env, authority.cert_pem.bytes(), folder / "hosts")
            cluster = cls(namespace, folder, objects, slices, time_scale, lag_s)
            write_hosts(objects.hosts, namespace, {})
            async with asyncio.TaskGroup() as group:
                reconciling = group.create_task(cluster._reconcile(group))
                try:
                    yield cluster
                finally:
                    for task in (reconciling, *cluster._tasks):
                        task.cancel()

    def apply(self, manifests: Sequence[dict[str, Any]]) -> None:
        """Takes all objects of a release, in place of those of the one before; Deployments that it lacks stay.

        Raises:
            ValueError: an object of a kind that is not known here.
        """
        by_kind: dict[str, list[dict[str, Any]]] = {}
        for manifest in manifests:
            if _HOOK in manifest["metadata"].get("annotations", {}):
                continue  # of Helm's, such as the pod of `helm test`
            by_kind.setdefault(manifest["kind"], []).append(manifest)
        for each in by_kind.pop("PersistentVolumeClaim", []):
            claim = self._folder / f"claim-{each['metadata']['name']}"
            claim.mkdir(exist_ok=True)
            self._objects.claims[each["metadata"]["name"]] = claim
        self._services = {each["metadata"]["name"]: each for each in by_kind.pop("Service", [])}
        self._budgets = by_kind.pop("PodDisruptionBudget", [])
        self._grant(by_kind.pop("Role", []), by_kind.pop("RoleBinding", []), by_kind.get("ServiceAccount", []))
        for each in by_kind.pop("Deployment", []):
            name = each["metadata"]["name"]
            if name in self._deployments:
                self._deployments[name].apply(each)
            else:
                self._deployments[name] = Deployment(each)
        if unknown := set(by_kind) - _INERT:
            raise ValueError(f"objects of kinds {sorted(unknown)} are not known here")

    async def settle(self, timeout_s: float) -> None:
        """Waits until all Deployments are as their manifests say, without pods that are starting or ending.

        Raises:
            NotSettled: with the pods, after the time-out.
        """
        try:
            async with asyncio.timeout(timeout_s):
                while not all(each.is_settled(self.pods) for each in self._deployments.values()):
                    await asyncio.sleep(_TICK_S)
        except TimeoutError:
            pods = ", ".join(f"{pod.name} ready={pod.ready} restarts={pod.num_restarts}" for pod in self.pods)
            raise NotSettled(f"after {timeout_s:g} s there are {pods}: see the logs in {self._folder}") from None

    async def drain(self, node: str) -> None:
        """`kubectl drain`: no new pods for the node, and its pods are evicted as their budgets allow."""
        self._nodes[node] = False
        while on_node := [pod for pod in self.pods if pod.node == node]:
            for pod in on_node:
                if not pod.terminating and may_evict(pod, self._budgets, self.pods, list(self._deployments.values())):
                    self._runners[pod.name].delete()
            await asyncio.sleep(_EVICTION_RETRY_S)

    def uncordon(self, node: str) -> None:
        self._nodes[node] = True

    def of_component(self, component: str) -> list[Pod]:
        return [pod for pod in self.pods if pod.labels["app.kubernetes.io/component"] == component]

    def kill(self, pod: Pod) -> None:
        """SIGKILL to the pod's service. Its kubelet starts it again."""
        self._runners[pod.name].kill()

    def host(self, service: str) -> str:
        return f"{service}.{self._namespace}.svc"

    async def _reconcile(self, group: asyncio.TaskGroup) -> None:
        while True:
            for deployment in self._deployments.values():
                deployment.reconcile(self.pods)
                for replica_set in deployment.missing(self.pods):
                    self._start_pod(group, replica_set, deployment.template(replica_set))
                for pod in deployment.surplus(self.pods):
                    self._runners[pod.name].delete()
            self._publish()
            await asyncio.sleep(_TICK_S)

    def _start_pod(self, group: asyncio.TaskGroup, replica_set: str, template: dict[str, Any]) -> None:
        self._num_pods += 1
        free = [node for node, is_schedulable in self._nodes.items() if is_schedulable]
        # Pods of one ReplicaSet are spread, as the scheduler does by default.
        here = {each: [pod.owner for pod in self.pods if pod.node == each] for each in free}
        node = min(free, key=lambda each: (here[each].count(replica_set), len(here[each])))
        address = str(self._first_address + self._num_pods)
        pod = Pod(f"{replica_set}-{self._num_pods}", replica_set, node, address, template["metadata"], template["spec"])
        runner = PodRunner(pod, self._objects, self._folder / pod.name, self._time_scale)
        self.pods.append(pod)
        self._runners[pod.name] = runner
        task = group.create_task(self._run_pod(pod, runner))
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _run_pod(self, pod: Pod, runner: PodRunner) -> None:
        await runner.run()
        self.pods.remove(pod)
        del self._runners[pod.name]
        self.ends += pod.ends

    def _publish(self) -> None:
        slices = {name: [endpoint_slice(service, self.pods)] for name, service in self._services.items()}
        if slices == self._published:
            return
        self._published = slices
        self._slices.change(slices)
        self.resolver.change({self.host(name): ready_addresses(each) for name, each in slices.items()})
        headless = {
            name: each for name, each in slices.items() if self._services[name]["spec"].get("clusterIP") == "None"
        }
        write_hosts(self._objects.hosts, self._namespace, headless)

    def _grant(
        self, roles: list[dict[str, Any]], bindings: list[dict[str, Any]], accounts: list[dict[str, Any]]
    ) -> None:
        """Gives accounts their tokens; the API server takes those of accounts whose Role lists and watches slices."""
        allowing = {
            role["metadata"]["name"]
            for role in roles
            for rule in role["rules"]
            if "endpointslices" in rule["resources"] and {"list", "watch"} <= set(rule["verbs"])
        }
        names = [each["metadata"]["name"] for each in accounts]
        self._objects.tokens.update({name: f"token-of-{name}" for name in names})
        bound = [each for each in bindings if each["roleRef"]["name"] in allowing]
        subjects = {subject["name"] for binding in bound for subject in binding["subjects"]}
        self._slices.tokens = {self._objects.tokens[name] for name in names if name in subjects}
