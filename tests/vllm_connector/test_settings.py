from __future__ import annotations

from typing import Any

import pytest

from vitrine_vlm.vllm_connector.settings import ConnectorSettings


def test_the_extra_config_is_read() -> None:
    settings = ConnectorSettings.from_extra_config({"encoders": "a:1,b:2", "tenant": "t", "deliver_timeout_s": 2})
    assert (settings.encoders, settings.tenant, settings.deliver_timeout_s) == ("a:1,b:2", "t", 2.0)
    assert settings.transport == "auto" and settings.check_revision


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        ({}, "encoders is missing"),
        ({"encoders": ""}, "encoders is missing"),
        ({"encoders": "a:1", "encoder": "b:1"}, "encoder: Extra inputs are not permitted"),
        ({"encoders": "a:1", "deliver_timeout_s": 0}, "deliver_timeout_s: Input should be greater than 0"),
        ({"encoders": "a:1", "transport": "pigeon"}, "transport: Input should be"),
        ({"encoders": "kubernetes:nothing"}, "encoders: .*needs a name and a port"),
        ({"encoders": "a:1", "encoder_cert_file": "/c"}, "encoder-key-file"),
    ],
)
def test_what_cannot_work_is_refused_by_name(extra: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ConnectorSettings.from_extra_config(extra)
