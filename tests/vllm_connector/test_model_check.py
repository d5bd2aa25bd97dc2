from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import AutoConfig

from vitrine_vlm.errors import EncoderMismatch
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import PROTOCOL_MINOR_VERSION, PROTOCOL_VERSION
from vitrine_vlm.vllm_connector.model_check import ServedModel, served_model

SERVED = ServedModel("qwen3_vl", 8, (1, 2), "bfloat16", 16, 2, 2)


def model_config(folder: Path) -> Any:
    """vLLM's ModelConfig, as far as it is read."""
    return SimpleNamespace(hf_config=AutoConfig.from_pretrained(folder), model=str(folder), dtype=torch.float32)


def description(**changed: Any) -> encoder_pb2.DescribeResponse:
    processor = {"patch_size": 16, "temporal_patch_size": 2, "merge_size": 2} | changed.pop("processor", {})
    fields: dict[str, Any] = {
        "protocol_version": PROTOCOL_VERSION,
        "protocol_minor_version": PROTOCOL_MINOR_VERSION,
        "model_type": "qwen3_vl",
        "revision": "a" * 64,
        "out_hidden_size": 8,
        "deepstack_visual_indexes": [1, 2],
        "dtype": "bfloat16",
    } | changed
    return encoder_pb2.DescribeResponse(processor=encoder_pb2.ProcessorSettings(**processor), **fields)


def test_the_model_is_read_from_vllms_config(qwen3_vl_folder: Path, qwen2_5_vl_folder: Path) -> None:
    model = served_model(model_config(qwen3_vl_folder), "auto", check_revision=True)
    assert (model.model_type, model.deepstack_visual_indexes, model.dtype) == ("qwen3_vl", (1, 2, 3), "float32")
    assert model.revision == open_checkpoint(str(qwen3_vl_folder)).revision
    assert model.row_format.row_width == 4 * model.out_hidden_size
    assert served_model(model_config(qwen3_vl_folder), "dummy", check_revision=True).revision.startswith("dummy-")
    assert served_model(model_config(qwen3_vl_folder), "auto", check_revision=False).revision == ""
    model = served_model(model_config(qwen2_5_vl_folder), "auto", check_revision=True)
    assert (model.model_type, model.deepstack_visual_indexes) == ("qwen2_5_vl", ())


def test_a_model_without_such_a_tower_is_refused() -> None:
    config = SimpleNamespace(hf_config=SimpleNamespace(model_type="llama"), model="m", dtype=torch.float32)
    with pytest.raises(ValueError, match="not 'llama'"):
        served_model(config, "auto", check_revision=True)


@pytest.mark.parametrize("revision", ["", "a" * 64])
def test_an_encoder_of_the_same_model_is_taken(revision: str) -> None:
    replace(SERVED, revision=revision).check("e:1", description())


def test_a_hub_commit_is_not_compared_with_a_folder() -> None:
    replace(SERVED, revision="b" * 64).check("e:1", description(revision="c" * 40))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"model_type": "qwen2_5_vl"}, "its model_type 'qwen2_5_vl', vLLM's is 'qwen3_vl'"),
        ({"out_hidden_size": 9}, "its out_hidden_size 9, vLLM's is 8"),
        ({"deepstack_visual_indexes": []}, r"its deepstack_visual_indexes \(\), vLLM's is \(1, 2\)"),
        ({"dtype": "float32"}, "its dtype 'float32', vLLM's is 'bfloat16'"),
        ({"processor": {"patch_size": 14}}, "its patch_size 14, vLLM's is 16"),
        ({"processor": {"merge_size": 1}}, "its merge_size 1, vLLM's is 2"),
        ({"revision": "c" * 64}, "its revision 'cccc.*', vLLM's is 'aaaa.*'"),
        ({"protocol_version": 99}, "its protocol_version 99"),
        ({"protocol_minor_version": 0}, "the connector needs 1: update the encoder"),
    ],
)
def test_another_encoder_is_refused_with_both_values(changed: dict[str, Any], message: str) -> None:
    with pytest.raises(EncoderMismatch, match=message):
        replace(SERVED, revision="a" * 64).check("e:1", description(**changed))
