"""Every command says its version, and so do metrics; for traces see tests/integration/test_traces.py."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest

from vitrine_vlm import __version__
from vitrine_vlm.deploy.launcher.__main__ import main as launcher
from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.encoder_service.metrics import EncoderMetrics
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.service_runtime.health_command import main as health

COMMANDS: dict[str, Callable[[Sequence[str]], object]] = {
    "vitrine": launcher,
    "vitrine-encoder": EncoderConfig.from_command_line,
    "vitrine-llm": LlmConfig.from_command_line,
    "vitrine-health": health,
}


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_prints_its_version(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        COMMANDS[name](["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"{name} {__version__}\n"


@pytest.mark.parametrize("metrics", [EncoderMetrics, LlmMetrics])
def test_metrics_have_the_version(metrics: type[EncoderMetrics | LlmMetrics]) -> None:
    registry = metrics().registry
    assert registry.get_sample_value("vitrine_build_info", {"version": __version__}) == 1.0
