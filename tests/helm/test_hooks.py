"""Pods that Helm runs itself: the download of a checkpoint, and the question of `helm test`."""

from __future__ import annotations

from typing import Any

import pytest
from helm_python import HelmRenderError

from tests.helm.pod_security import violations
from tests.helm.rendering import CHART, REGISTRY, of_kind, pods, pods_of, render, rendered
from tests.helm.test_config import config_files
from tests.helm.test_network_policies import allowed


class TestDownload:
    """Of the checkpoint, into a claim."""

    def test_it_is_done_before_pods_start_or_change(self) -> None:
        (job,) = of_kind(rendered("extras"), "Job").values()
        assert job["metadata"]["annotations"]["helm.sh/hook"] == "pre-install,pre-upgrade"
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        assert container["command"] == ["hf", "download", "Qwen/Qwen3-VL-8B-Instruct", "--revision", "main"]
        assert container["image"] == f"{REGISTRY}/vitrine-encoder:0.1.0"
        assert violations(spec) == []
        assert "serviceAccountName" not in spec, "those of the release are not there yet"

    def test_it_writes_where_services_read(self) -> None:
        (job,) = of_kind(rendered("extras"), "Job").values()
        spec = job["spec"]["template"]["spec"]
        (container,) = spec["containers"]
        for pod in pods("extras").values():
            assert {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}} in pod.spec["volumes"]
            assert {"name": "cache", "persistentVolumeClaim": {"claimName": "models"}} in spec["volumes"]
            assert {"name": "cache", "mountPath": "/cache"} in container["volumeMounts"]
            variables = {each["name"]: each for each in container["env"]}
            for name in ("HF_HOME", "HF_TOKEN"):
                assert variables[name] == next(each for each in pod.container["env"] if each["name"] == name)

    @pytest.mark.parametrize(
        ("values", "message"),
        [
            ({"modelCache": {"download": {"enabled": True}}}, "needs a claim that is there before the release"),
            (
                {
                    "model": "/cache/m",
                    "modelCache": {
                        "kind": "persistentVolumeClaim",
                        "existingClaim": "c",
                        "download": {"enabled": True},
                    },
                },
                "model /cache/m is a folder",
            ),
        ],
    )
    def test_what_it_needs(self, values: dict[str, Any], message: str) -> None:
        with pytest.raises(HelmRenderError, match=message):
            render({"model": "m"} | values)


class TestModelInAClaim:
    """`pvc://CLAIM/FOLDER`."""

    @pytest.mark.parametrize("extra", [{}, {"engine": "vllm"}, {"mode": "rayservice"}])
    def test_pods_read_it_there(self, extra: dict[str, Any]) -> None:
        manifests = render({"model": "pvc://weights/qwen/8b"} | extra)
        for pod in pods_of(manifests).values():
            if pod.program == "gateway":
                continue
            claim = {"claimName": "weights", "readOnly": True}
            assert {"name": "models", "persistentVolumeClaim": claim} in pod.spec["volumes"]
            assert {"name": "models", "mountPath": "/models", "readOnly": True} in pod.container["volumeMounts"]
        models = {each["model"] for each in config_files(manifests).values() if "model" in each}
        assert models == (set() if extra.get("mode") else {"/models/qwen/8b"})
        (asking,) = of_kind(manifests, "Pod").values()
        assert "--model=8b" in asking["spec"]["containers"][0]["args"]

    def test_another_form_is_refused(self) -> None:
        for model in ("pvc://weights", "pvc://Weights/a", "pvc:weights/a", "pvc://weights//a"):
            with pytest.raises(HelmRenderError, match="a folder of a claim is written pvc://CLAIM/FOLDER"):
                render({"model": model})


class TestHelmTest:
    """A question about a picture; tests/integration asks it for real."""

    @pytest.mark.parametrize("values", ["default", "vllm", "rayservice", "keys"])
    def test_it_asks_what_users_call(self, values: str) -> None:
        manifests = rendered(values)
        (pod,) = of_kind(manifests, "Pod").values()
        assert violations(pod["spec"]) == []
        (container,) = pod["spec"]["containers"]
        url = next(each for each in container["args"] if each.startswith("--url="))
        service = url.split("//")[1].split(".")[0]
        assert service in of_kind(manifests, "Service") or service == "demo-vitrine-serve-svc"
        script = of_kind(manifests, "ConfigMap")["demo-vitrine-test"]["data"]["ask.py"]
        assert script.strip() == (CHART / "files" / "ask.py").read_text().strip()
        compile(script, "ask.py", "exec")
        assert ("--expect-refusal" in container["args"]) == (values == "keys")
        assert url.startswith("--url=https://") == (values in ("vllm", "keys"))
        assert any(each.startswith("--cert-file=") for each in container["args"]) == (values in ("vllm", "keys"))

    def test_policies_let_it_through(self) -> None:
        (pod,) = of_kind(rendered("locked-down"), "Pod").values()
        policy = of_kind(rendered("locked-down"), "NetworkPolicy")["demo-vitrine-llm"]["spec"]
        labels = {
            name: value
            for name, value in pod["metadata"]["labels"].items()
            if name in ("app.kubernetes.io/name", "app.kubernetes.io/instance", "app.kubernetes.io/component")
        }
        assert allowed(policy["ingress"], 8000, {"podSelector": {"matchLabels": labels}}, "from")
