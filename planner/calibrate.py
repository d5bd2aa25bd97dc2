"""Measures the user's own GPU: each half of the model in a process of its own, one after the other."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

from vitrine_vlm.planner.costs import Costs


def calibrate(model: str, encoder_flags: Sequence[str] = (), worker_flags: Sequence[str] = ()) -> Costs:
    """
    Args:
        model: checkpoint folder or hub id. encoder_flags, worker_flags: of the services, such as `--quantization fp8`.

    Raises:
        ValueError: a half could not be loaded; its log stands on stderr.
    """
    tower, decoder = _measure("tower", model, encoder_flags), _measure("decoder", model, worker_flags)
    source = f"measured on {date.today().isoformat()} by vitrine-plan calibrate"
    return Costs.model_validate({**tower, "decoder": decoder, "source": source})


def write_costs(costs: Costs, file: Path) -> None:
    file.write_text(costs.model_dump_json(indent=2) + "\n")


def _measure(half: str, model: str, flags: Sequence[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", "vitrine_vlm.planner.measure", half, model, *flags]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode != 0:
        raise ValueError(f"the {half} of {model} could not be measured: exit status {done.returncode}")
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found
