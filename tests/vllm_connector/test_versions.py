from __future__ import annotations

import pytest

from vitrine_vlm.vllm_connector.versions import warn_if_unknown


@pytest.mark.parametrize("version", ["0.30.0", "0.31.1", "0.32.0", "0.32.0+cpu", "0.33.0rc1"])
def test_known_versions_are_not_warned_of(version: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_unknown(version)
    assert not caplog.records


@pytest.mark.parametrize("version", ["0.29.3", "0.34.0", "1.0.0", "0.3.0", "0.320.0", "dev", ""])
def test_others_are_warned_of_with_both_sides_versions(version: str, caplog: pytest.LogCaptureFixture) -> None:
    warn_if_unknown(version)
    assert f"made for vLLM 0.30 to 0.33, this is {version}:" in caplog.text
