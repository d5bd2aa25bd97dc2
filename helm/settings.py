"""Writes vitrine/files/checks/known.yaml: what the chart's templates cannot see for themselves.

`settings` are the names that the services take, so that the chart refuses a misspelt one before a pod does. `defaults`
are values of values.yaml, with which the chart compares what a mode or engine does not use.

    python helm/settings.py [--check]
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import yaml

from vitrine_vlm.encoder_service.config import EncoderConfig
from vitrine_vlm.gateway.config import GatewayConfig
from vitrine_vlm.llm_worker.config import LlmConfig
from vitrine_vlm.vllm_connector.settings import ConnectorSettings

CHART = Path(__file__).parent / "vitrine"
_FILE = CHART / "files" / "checks" / "known.yaml"
_HEADER = "# Made by helm/settings.py from the services' settings and values.yaml.\n"
_SETTINGS = {"encoder": EncoderConfig, "llm": LlmConfig, "gateway": GatewayConfig, "connector": ConnectorSettings}
# Those that mode rayservice does not use, of the pools some keys; then those that only one mode or engine uses.
_COMPARED = (
    *("encoders", "llm", "discovery", "service", "preStopSleepSeconds", "keda"),
    *("ray", "vllm", "gateway", "sglang", "colocation"),
)


def known() -> str:
    """Returns the file's text."""
    values: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
    content = {
        "settings": {program: sorted(settings.model_fields) for program, settings in _SETTINGS.items()},
        "defaults": {name: values[name] for name in _COMPARED},
    }
    return _HEADER + yaml.safe_dump(content, sort_keys=True, width=120)


def main() -> int:
    parser = argparse.ArgumentParser(description="Write the settings and defaults that the chart compares values with.")
    parser.add_argument("--check", action="store_true", help="write nothing, fail if the file is out of date")
    check = parser.parse_args().check
    text = known()
    if check and (not _FILE.exists() or _FILE.read_text() != text):
        print(f"{_FILE} is out of date: run python helm/settings.py", file=sys.stderr)
        return 1
    if not check:
        _FILE.write_text(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
