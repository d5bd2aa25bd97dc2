"""vLLM's own parser takes the files of the Helm chart and the command of the compose file."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import yaml

from tests.deploy.docker.compose import filled_in, services
from tests.helm.rendering import rendered
from tests.helm.test_vllm import WITH_VLLM, vllm_files
from tests.vllm.server import vllm_environment

_PARSE = Path(__file__).with_name("parse_arguments.py")


def test_vllm_takes_what_chart_and_compose_file_give_it(vllm_python: Path, vllm_cache: Path, tmp_path: Path) -> None:
    configs = [config for values in WITH_VLLM for config in vllm_files(rendered(values)).values()]
    files = [tmp_path / f"{number}.yaml" for number in range(len(configs))]
    for file, config in zip(files, configs, strict=True):
        file.write_text(yaml.safe_dump(config))
    command = [filled_in(argument) for argument in services("compose.vllm.yaml")["vllm"]["command"]]
    *of_files, of_command = _parsed([*(["--config", str(file)] for file in files), command], vllm_python, vllm_cache)

    for found, config in zip(of_files, configs, strict=True):
        assert found["served_model_name"] == [config["served_model_name"]]
        for name in ("model", "shutdown_timeout", "limit_mm_per_prompt"):
            assert found[name] == config[name]
        assert config["ec_transfer_config"].items() <= found["ec_transfer_config"].items()
    assert of_command["model_tag"] == "/models/vitrine-tiny-vlm"
    assert of_command["limit_mm_per_prompt"] == {"image": 0, "video": 0}
    connector = of_command["ec_transfer_config"]["ec_connector_extra_config"]
    assert connector == {"encoders": "encoder:50051", "shm_folder": "/run/vitrine"}


def _parsed(lists: list[list[str]], vllm_python: Path, vllm_cache: Path) -> list[dict[str, Any]]:
    """What vLLM makes of each list of arguments, in one process: loading vLLM takes seconds."""
    done = subprocess.run(
        [vllm_python, _PARSE, json.dumps(lists)],
        env=vllm_environment(vllm_cache),
        cwd=vllm_cache,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    found: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return found
