"""Messages as evaluation harnesses make them, and what transformers answers."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

from tests.integration.media import picture
from vitrine_vlm.sample_models.reference import Media, Reference


def greedy(reference: Reference, prompt: str, media: list[Media], num_tokens: int = 24) -> str:
    text: str = reference.tokenizer.decode(reference.greedy(reference.inputs(prompt, media), num_tokens)[0])
    return text


def user(*content: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "user", "content": list(content)}]


def chat_prompt(reference: Reference, messages: list[dict[str, Any]]) -> str:
    """messages: media as {"type": "image"}."""
    prompt: str = reference.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return prompt


def text(value: str) -> dict[str, Any]:
    return {"type": "text", "text": value}


def as_png(media: Media) -> dict[str, Any]:
    """A picture in the bodies of lmms-eval."""
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(media.data).decode()}"},
    }


def as_jpeg(media: Media, **others: Any) -> dict[str, Any]:
    """A JPEG in the bodies of VLMEvalKit."""
    url = f"data:image/jpeg;base64,{base64.b64encode(media.data).decode()}"
    return {"type": "image_url", "image_url": {"url": url, **others}}


def jpeg(seed: int) -> Media:
    file = io.BytesIO()
    Image.open(io.BytesIO(picture(seed, 128, 112).data)).save(file, "JPEG")
    return Media("image", file.getvalue())


def without_data(messages: list[dict[str, Any]], kind: str = "image") -> list[dict[str, Any]]:
    """The same as the chat template gets them, with all media of one kind."""
    return [
        {
            "role": message["role"],
            "content": [part if part["type"] == "text" else {"type": kind} for part in message["content"]],
        }
        for message in messages
    ]
