"""A checkpoint's generation_config.json, as transformers and vLLM read it."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.model_loading.checkpoint import open_checkpoint


@pytest.mark.parametrize(
    ("file", "expected"),
    [
        (
            # Qwen2.5-VL's own.
            {"do_sample": True, "temperature": 1e-6, "repetition_penalty": 1.05, "eos_token_id": [1, 2]},
            SamplingDefaults(1e-6, 1.0, 0, frozenset([1, 2]), repetition_penalty=1.05),
        ),
        (
            {"do_sample": True, "temperature": 0.7, "top_p": 0.8, "top_k": 20, "min_p": 0.05, "eos_token_id": 3},
            SamplingDefaults(0.7, 0.8, 20, frozenset([3]), min_p=0.05),
        ),
        # Penalties count for greedy answers, too.
        (
            {"repetition_penalty": 1.2, "temperature": 0.7, "eos_token_id": 3},
            SamplingDefaults(0.0, 1.0, 0, frozenset([3]), repetition_penalty=1.2),
        ),
        ({"repetition_penalty": None, "min_p": None, "eos_token_id": 3}, SamplingDefaults(0.0, 1.0, 0, frozenset([3]))),
    ],
)
def test_defaults(tmp_path: Path, qwen3_vl_folder: Path, file: dict[str, Any], expected: SamplingDefaults) -> None:
    folder = shutil.copytree(qwen3_vl_folder, tmp_path / "copy")
    (folder / "generation_config.json").write_text(json.dumps(file))
    assert SamplingDefaults.from_checkpoint(open_checkpoint(str(folder))) == expected
