"""Training computes what the services will compute, and learns."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Qwen3VLForConditionalGeneration

from benchmarks.accuracy.questions import held_out_questions
from vitrine_vlm.sample_models.reference import Media, Reference
from vitrine_vlm.sample_models.tiny_vlm import MODEL_FOLDER
from vitrine_vlm.sample_models.tiny_vlm.data.generator import KINDS
from vitrine_vlm.sample_models.tiny_vlm.training import __main__ as training
from vitrine_vlm.sample_models.tiny_vlm.training.architecture import tiny_config
from vitrine_vlm.sample_models.tiny_vlm.training.examples import BatchMaker
from vitrine_vlm.sample_models.tiny_vlm.training.forward import answer_logits
from vitrine_vlm.sample_models.tiny_vlm.training.muon import Float32Muon
from vitrine_vlm.sample_models.tiny_vlm.training.packed_attention import use_packed_attention

# One question of every kind but video: its file is lossy, and a packed batch has the frames as they were drawn.
INDICES = [index for index, kind in enumerate(KINDS) if kind != "video"]
STEPS = 20


def packed_model(folder: Path) -> Qwen3VLForConditionalGeneration:
    model = Qwen3VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    use_packed_attention(model)
    return model


@pytest.mark.parametrize("index", INDICES)
def test_one_packed_pass_equals_transformers_one_by_one(index: int, logits: list[torch.Tensor]) -> None:
    """A batch of all kinds at once against transformers' own model and processor over a single question."""
    question = held_out_questions(len(KINDS))[index]
    reference = Reference(MODEL_FOLDER)
    expected = _answer_logits(reference, list(question.media), question.text, question.answer)
    torch.testing.assert_close(logits[INDICES.index(index)], expected, atol=2e-4, rtol=2e-4)


@pytest.fixture(scope="module")
def logits() -> list[torch.Tensor]:
    """[answer tokens, vocab] of every question, out of one packed pass."""
    batch = BatchMaker(MODEL_FOLDER).heldout_batch(INDICES)
    with torch.inference_mode():
        rows, targets = answer_logits(packed_model(MODEL_FOLDER), batch)
    ends = (targets == tiny_config().text_config.eos_token_id).nonzero().flatten() + 1
    return list(rows.tensor_split(ends[:-1].tolist()))


def _answer_logits(reference: Reference, media: list[Media], question: str, answer: str) -> torch.Tensor:
    content = [*({"type": item.kind} for item in media), {"type": "text", "text": question}]
    prompt = reference.tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
    )
    inputs = reference.inputs(f"{prompt}{answer}<|im_end|>", media)
    num_answer = len(reference.tokenizer.encode(f"{answer}<|im_end|>"))
    with torch.inference_mode():
        logits: torch.Tensor = reference.model(**inputs).logits
    return logits[0, -num_answer - 1 : -1]


def test_a_few_steps_on_the_cpu_lower_the_loss_and_write_a_checkpoint(tmp_path: Path) -> None:
    folder = tmp_path / "trained"
    training.main([str(folder), "--steps", str(STEPS), "--samples", "4", "--workers", "0", "--questions", "11"])
    torch.manual_seed(0)
    untrained = Qwen3VLForConditionalGeneration._from_config(tiny_config(), dtype=torch.float32)
    use_packed_attention(untrained)
    batch = BatchMaker(folder).heldout_batch(INDICES)
    losses = []
    for model in (untrained, packed_model(folder)):
        with torch.inference_mode():
            losses.append(torch.nn.functional.cross_entropy(*answer_logits(model, batch)).item())
    assert losses[1] < losses[0] - 0.5


class _ProductDtypes(TorchDispatchMode):
    """Collects what matrix products are computed in."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: set[torch.dtype] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm):
            self.seen.add(result.dtype)
        return result


def test_muon_in_float32_takes_the_step_of_torchs_muon() -> None:
    steps, dtypes = [], []
    for kind in (torch.optim.Muon, Float32Muon):
        torch.manual_seed(0)
        weight = torch.nn.Parameter(torch.zeros(48, 32))
        weight.grad = torch.randn(48, 32)
        with _ProductDtypes() as products:
            kind([weight], lr=1.0, adjust_lr_fn="match_rms_adamw").step()
        steps.append(weight.detach())
        dtypes.append(products.seen)
    assert dtypes == [{torch.bfloat16}, {torch.float32}]
    assert steps[1].norm() > 1
    torch.testing.assert_close(*steps, atol=0.02, rtol=0.0)
