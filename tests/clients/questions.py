"""Questions about pictures, and what transformers answers in one process."""

from __future__ import annotations

import base64
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch

from vitrine_vlm.sample_models.reference import Media, Reference

_PICTURES = Path(__file__).parents[2] / "docs" / "pictures"


@dataclass(frozen=True)
class Expected:
    """A greedy answer. logprobs: of its tokens, each with the two largest in its place."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    tokens: tuple[str, ...]
    logprobs: tuple[tuple[float, float, float], ...]


class Questions:
    def __init__(self, folder: Path) -> None:
        self._reference = Reference(folder)

    @cache  # noqa: B019  # one for the session
    def expected(self, question: str, pictures: tuple[str, ...] = (), max_tokens: int = 64) -> Expected:
        """The answer to a user's message of pictures of docs/pictures and a question behind them."""
        reference = self._reference
        media = [Media("image", _file(name).read_bytes()) for name in pictures]
        content = [*({"type": "image"} for _ in media), {"type": "text", "text": question}]
        prompt = reference.tokenizer.apply_chat_template(
            [{"role": "user", "content": content}], add_generation_prompt=True, tokenize=False
        )
        inputs = reference.inputs(prompt, media)
        with torch.inference_mode():
            out = reference.model.generate(
                **inputs, max_new_tokens=max_tokens, do_sample=False, output_logits=True, return_dict_in_generate=True
            )
        num_prompt = inputs["input_ids"].shape[1]
        ids = out.sequences[0, num_prompt:].tolist()
        logprobs = torch.cat(out.logits).log_softmax(-1)
        top = logprobs.topk(2).values.tolist()
        own = logprobs.gather(1, torch.tensor(ids)[:, None])[:, 0].tolist()
        return Expected(
            text=reference.tokenizer.decode(ids, skip_special_tokens=True),
            prompt_tokens=num_prompt,
            completion_tokens=len(ids),
            tokens=tuple(reference.tokenizer.decode([each]) for each in ids),
            logprobs=tuple((mine, *two) for mine, two in zip(own, top, strict=True)),
        )


def data_url(name: str) -> str:
    """A picture of docs/pictures."""
    return f"data:image/png;base64,{base64.b64encode(_file(name).read_bytes()).decode()}"


def _file(name: str) -> Path:
    return _PICTURES / f"{name}.png"
