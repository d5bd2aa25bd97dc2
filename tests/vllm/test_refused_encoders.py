"""vLLM does not start with an encoder whose rows would be wrong, and says both sides' values."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path

import pytest

from tests.vllm.checkpoints import Folders, random_qwen3_vl
from tests.vllm.fleet import start_encoder
from tests.vllm.server import vllm_environment

# What the error must contain, by what is wrong with the encoder.
VALUES = {
    "model": ["model_type 'qwen2_5_vl'", "'qwen3_vl'", "patch_size 14", "16"],
    "dtype": ["dtype 'bfloat16'", "'float32'"],
    "width": ["out_hidden_size 64", "96"],
    "weights": ["revision"],
}


@pytest.fixture(scope="module")
def errors(
    vllm_python: Path, vllm_cache: Path, folders: Folders, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, str]:
    """What vLLM says at its start with each encoder, by what is wrong with it."""
    parent = tmp_path_factory.mktemp("others")
    with contextlib.ExitStack() as stack:
        encoders = {
            "model": stack.enter_context(start_encoder(folders["qwen2_5_vl"])),
            "dtype": stack.enter_context(start_encoder(folders["qwen3_vl"], dtype="bfloat16")),
            "width": stack.enter_context(start_encoder(random_qwen3_vl(parent / "narrow", hidden_size=64))),
            "weights": stack.enter_context(start_encoder(random_qwen3_vl(parent / "others", seed=1))),
        }
        for encoder in encoders.values():
            encoder.wait_serving()
        script = Path(__file__).with_name("refused_encoders.py")
        done = subprocess.run(
            [vllm_python, script, folders["qwen3_vl"], *(encoder.address for encoder in encoders.values())],
            env=vllm_environment(vllm_cache) | {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"},
            cwd=vllm_cache,
            stdout=subprocess.PIPE,
            text=True,
            check=True,
        )
        found = json.loads(done.stdout.splitlines()[-1])
        return {wrong: found[encoder.address] for wrong, encoder in encoders.items()}


@pytest.mark.parametrize("wrong", VALUES)
def test_an_encoder_of_another_model_is_refused_with_both_values(wrong: str, errors: dict[str, str]) -> None:
    assert "EncoderMismatch" in errors[wrong]
    for value in VALUES[wrong]:
        assert value in errors[wrong]
