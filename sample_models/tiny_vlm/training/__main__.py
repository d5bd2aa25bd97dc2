"""Trains the tiny model: `python -m vitrine_vlm.sample_models.tiny_vlm.training FOLDER` writes a checkpoint there.

It takes minutes on one GPU; on a CPU only a smoke test with few `--steps` and `--samples` is practical.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset
from transformers import Qwen3VLForConditionalGeneration

from vitrine_vlm.model_loading.loading import cpu_has_bfloat16
from vitrine_vlm.sample_models.tiny_vlm.data.generator import KINDS
from vitrine_vlm.sample_models.tiny_vlm.training.architecture import (
    generation_config,
    save_processor_configs,
    tiny_config,
)
from vitrine_vlm.sample_models.tiny_vlm.training.examples import Batch, BatchMaker
from vitrine_vlm.sample_models.tiny_vlm.training.forward import answer_logits
from vitrine_vlm.sample_models.tiny_vlm.training.muon import Float32Muon
from vitrine_vlm.sample_models.tiny_vlm.training.packed_attention import use_packed_attention
from vitrine_vlm.sample_models.tiny_vlm.training.tokenizer import save_tokenizer

_WARMUP_STEPS = 150
_END_OF_DECAY = 0.01
_WEIGHT_DECAY = 0.05
_ADAMW_BETAS = (0.9, 0.98)
_MAX_GRAD_NORM = 1.0
# The share of examples with deepstack rows only: otherwise the model would hardly need these rows, and a service that
# loses them would answer nearly as well.
_DROP_MAIN = 0.3
_EVALUATION_BATCH = 100
_LOG_EVERY = 50


class _TrainingBatches(Dataset[Batch]):
    """Item `step` is the whole batch of that step, independent of the process that makes it."""

    def __init__(self, folder: Path, num_steps: int, num_samples: int) -> None:
        self._maker = BatchMaker(folder)
        self._num_steps, self._num_samples = num_steps, num_samples

    def __len__(self) -> int:
        return self._num_steps

    def __getitem__(self, step: int) -> Batch:
        if step >= self._num_steps:
            raise IndexError(step)
        return self._maker.training_batch(range(step * self._num_samples, (step + 1) * self._num_samples))


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parser().parse_args(arguments)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(options.seed)
    config = tiny_config()
    options.folder.mkdir(parents=True, exist_ok=True)
    config.save_pretrained(options.folder)
    save_processor_configs(options.folder)
    save_tokenizer(options.folder)
    model = Qwen3VLForConditionalGeneration._from_config(config, dtype=torch.float32).to(device)
    use_packed_attention(model)
    if device.type == "cuda":
        for layer in (*model.model.visual.blocks, *model.model.language_model.layers):
            layer.compile(dynamic=True)
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    print(f"{num_parameters / 1e6:.2f} M parameters, {options.steps} steps of {options.samples} samples", flush=True)
    evaluation = _Evaluation(options.folder, options.questions)
    _train(model, options, evaluation)
    model.to(torch.bfloat16)
    model.generation_config = generation_config()
    model.save_pretrained(options.folder)
    print(f"in bf16: {evaluation(model.float())}", flush=True)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the checkpoint is written")
    parser.add_argument("--steps", type=int, default=8_000, help="default: %(default)s")
    parser.add_argument(
        "--samples", type=int, default=512, help="pictures with their questions a step; default: %(default)s"
    )
    parser.add_argument("--learning-rate", type=float, default=2e-3, help="peak; default: %(default)s")
    parser.add_argument("--workers", type=int, default=14, help="processes that draw samples; default: %(default)s")
    parser.add_argument(
        "--questions", type=int, default=1100, help="held-out questions of an evaluation; default: %(default)s"
    )
    parser.add_argument("--evaluate-every", type=int, default=500, help="steps; default: %(default)s")
    parser.add_argument("--seed", type=int, default=0, help="of the initial weights; default: %(default)s")
    return parser


def _train(model: Qwen3VLForConditionalGeneration, options: argparse.Namespace, evaluation: _Evaluation) -> None:
    device = model.device
    batches = DataLoader(
        _TrainingBatches(options.folder, options.steps, options.samples),
        batch_size=None,
        num_workers=options.workers,
        prefetch_factor=2 if options.workers else None,
        pin_memory=device.type == "cuda",
    )
    optimizers = _optimizers(model)
    start, waited = time.perf_counter(), 0.0
    losses: list[torch.Tensor] = []
    for step, (batch, wait_s) in enumerate(_timed(batches)):
        waited += wait_s
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = options.learning_rate * _schedule(step, options.steps)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            logits, targets = answer_logits(model, batch.to(device), drop_main=_DROP_MAIN)
        loss = torch.nn.functional.cross_entropy(logits, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), _MAX_GRAD_NORM)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.detach())
        if (step + 1) % _LOG_EVERY == 0 or step + 1 == options.steps:
            mean = torch.stack(losses).mean().item()
            seconds = time.perf_counter() - start
            print(
                f"step {step + 1}: loss {mean:.4f}, {seconds:.0f} s, {waited:.0f} s of it waiting for data", flush=True
            )
            losses.clear()
        if (step + 1) % options.evaluate_every == 0 and step + 1 < options.steps:
            print(f"step {step + 1}: {evaluation(model)}", flush=True)


def _timed(batches: DataLoader[Batch]) -> Iterator[tuple[Batch, float]]:
    start = time.perf_counter()
    for batch in batches:
        yield batch, time.perf_counter() - start
        start = time.perf_counter()


def _optimizers(model: Qwen3VLForConditionalGeneration) -> list[torch.optim.Optimizer]:
    matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name]
    chosen = {id(p) for p in matrices}
    others = [p for p in model.parameters() if id(p) not in chosen]
    in_bfloat16 = model.device.type == "cuda" or cpu_has_bfloat16()
    if not in_bfloat16:
        print("Muon computes in float32: the CPU has no bfloat16 instructions", flush=True)
    muon = torch.optim.Muon if in_bfloat16 else Float32Muon
    return [
        muon(matrices, weight_decay=_WEIGHT_DECAY, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, betas=_ADAMW_BETAS, weight_decay=0.0),
    ]


def _schedule(step: int, num_steps: int) -> float:
    """Returns the factor of the learning rate: linear warm-up, then a cosine down to _END_OF_DECAY of the peak."""
    if step < _WARMUP_STEPS:
        return (step + 1) / _WARMUP_STEPS
    done = (step - _WARMUP_STEPS) / max(1, num_steps - _WARMUP_STEPS)
    return _END_OF_DECAY + (1 - _END_OF_DECAY) * (1 + math.cos(math.pi * done)) / 2


class _Evaluation:
    """Evaluates a model on held-out questions, the same ones in every call."""

    def __init__(self, folder: Path, num_questions: int) -> None:
        maker = BatchMaker(folder)
        firsts = range(0, num_questions, _EVALUATION_BATCH)
        self._indices = [range(first, min(first + _EVALUATION_BATCH, num_questions)) for first in firsts]
        self._batches = [maker.heldout_batch(indices) for indices in self._indices]

    @torch.inference_mode()
    def __call__(self, model: Qwen3VLForConditionalGeneration) -> str:
        """Returns the accuracy as text."""
        asked = Counter(KINDS[index % len(KINDS)] for indices in self._indices for index in indices)
        right, without = self._right(model), self._right(model, zero_deepstack=True)
        kinds = ", ".join(f"{kind} {right[kind] / asked[kind]:.1%}" for kind in KINDS if asked[kind])
        return (
            f"{right.total() / asked.total():.2%} of {asked.total()} held-out questions right ({kinds}), "
            f"{without.total() / asked.total():.2%} with deepstack rows zeroed"
        )

    def _right(self, model: Qwen3VLForConditionalGeneration, *, zero_deepstack: bool = False) -> Counter[str]:
        """Counts right answers by kind. Greedy decoding is right if and only if the argmax of every token is right."""
        right: Counter[str] = Counter()
        for indices, batch in zip(self._indices, self._batches, strict=True):
            logits, targets = answer_logits(model, batch.to(model.device), zero_deepstack=zero_deepstack)
            missed = (logits.argmax(-1) != targets).cpu()
            # Each example's answer ends with <|im_end|>.
            ends = (targets.cpu() == model.config.text_config.eos_token_id).nonzero().flatten().tolist()
            begin = 0
            for index, last in zip(indices, ends, strict=True):
                right[KINDS[index % len(KINDS)]] += not missed[begin : last + 1].any()
                begin = last + 1
        return right


if __name__ == "__main__":
    sys.exit(main())
