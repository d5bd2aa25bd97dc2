"""The random checkpoints load in transformers, are repeatable, and react to what they see."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vitrine_vlm.sample_models.random_checkpoint import save_random_checkpoint

NUM_TOKENS = 8


def greedy(folder: Path, prompt: str, color: str | None) -> str:
    """What transformers answers to the prompt and a picture of one color."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    content: list[dict[str, str]] = [{"type": "text", "text": prompt}]
    inputs: dict[str, torch.Tensor] = {}
    if color is not None:
        content.insert(0, {"type": "image"})
        picture = Image.new("RGB", (96, 96), color)
        inputs = dict(Qwen2VLImageProcessorPil.from_pretrained(folder)(picture, return_tensors="pt"))
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    if color is not None:
        text = text.replace("<|image_pad|>", "<|image_pad|>" * (int(inputs["image_grid_thw"].prod()) // 4))
    ids = tokenizer(text, return_tensors="pt").input_ids
    output = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        mm_token_type_ids=(ids == model.config.image_token_id).int(),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        **inputs,
    )
    answer: str = tokenizer.decode(output[0, ids.shape[1] :])
    return answer


def test_answer_depends_on_picture_and_prompt(checkpoint_folder: Path) -> None:
    answers = {
        greedy(checkpoint_folder, "What is this?", "red"),
        greedy(checkpoint_folder, "What is this?", "blue"),
        greedy(checkpoint_folder, "What is this?", None),
        greedy(checkpoint_folder, "Name it!", "red"),
    }
    assert len(answers) == 4
    for answer in answers:
        assert len(answer) == NUM_TOKENS, "no special token and no early end"
        assert answer.isascii()


def test_equal_seeds_give_equal_files(tmp_path: Path, qwen3_vl_folder: Path) -> None:
    again = save_random_checkpoint(tmp_path / "again", "qwen3_vl")
    other = save_random_checkpoint(tmp_path / "other", "qwen3_vl", seed=1)
    names = sorted(path.name for path in qwen3_vl_folder.iterdir())
    assert names == sorted(path.name for path in again.iterdir())
    for name in names:
        assert (qwen3_vl_folder / name).read_bytes() == (again / name).read_bytes(), name
    assert (other / "model.safetensors").read_bytes() != (again / "model.safetensors").read_bytes()


def test_shards(tmp_path: Path) -> None:
    folder = save_random_checkpoint(tmp_path, "qwen3_vl", max_shard_size="1MB")
    weight_map = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
    assert len(set(weight_map.values())) > 2
    assert all((folder / file).is_file() for file in weight_map.values())


def test_tokenizer_returns_any_text(checkpoint_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint_folder)
    text = "<|im_start|>user\nÄ 漢字 🙂\t<|vision_start|><|image_pad|><|vision_end|>"
    ids = tokenizer(text).input_ids
    config = json.loads((checkpoint_folder / "config.json").read_text())
    assert tokenizer.decode(ids) == text
    assert ids.count(config["image_token_id"]) == 1
    assert ids[-3] == config["vision_start_token_id"]
    assert ids[-1] == config["vision_end_token_id"]


def test_chat_template(qwen3_vl_folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(qwen3_vl_folder)
    messages = [
        {"role": "system", "content": "Be brief."},
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Compare "},
                {"type": "image_url", "image_url": {"url": "http://a"}},
                {"type": "video_url", "video_url": {"url": "http://b"}},
            ],
        },
    ]
    assert tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\nCompare <|vision_start|><|image_pad|><|vision_end|>"
        "<|vision_start|><|video_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )


def test_unknown_family(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="qwen9"):
        save_random_checkpoint(tmp_path, "qwen9")  # type: ignore[arg-type]
