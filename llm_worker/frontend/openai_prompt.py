"""Turns an OpenAI request into a GenerationRequest: messages into text, content parts into media items and so on."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from vitrine_vlm.embedding_transport.clients.media_url import item_from_url
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.frontend.openai_types import (
    ChatRequest,
    CompletionRequest,
    ImagePart,
    Message,
    TextPart,
    VideoPart,
)
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.types import MediaItem


def chat_text(messages: Sequence[Message], tokenizer: PromptTokenizer) -> str:
    """The prompt's text, with one placeholder a media item.

    Raises:
        BadRequest: a template that refuses the messages.
    """
    return tokenizer.render_chat([_template_message(message) for message in messages])


def chat_to_generation(
    request: ChatRequest, tokenizer: PromptTokenizer | None, defaults: SamplingDefaults, request_id: str
) -> GenerationRequest:
    """
    Raises:
        BadRequest: no tokenizer, a template that refuses the messages, or a malformed data: URL.
    """
    if tokenizer is None:
        raise BadRequest("this worker runs without a tokenizer: send token ids to /v1/completions")
    parts = [part for message in request.messages if isinstance(message.content, list) for part in message.content]
    media = tuple(_media_item(part) for part in parts if not isinstance(part, TextPart))
    max_tokens = request.max_completion_tokens or request.max_tokens
    return GenerationRequest(
        request_id=f"chatcmpl-{request_id}",
        prompt=chat_text(request.messages, tokenizer),
        media=media,
        sampling=_sampling(request, max_tokens, defaults),
        stop=request.stop_strings,
    )


def completion_to_generation(
    request: CompletionRequest, defaults: SamplingDefaults, request_id: str
) -> GenerationRequest:
    """
    Raises:
        BadRequest: a malformed data: URL.
    """
    return GenerationRequest(
        request_id=f"cmpl-{request_id}",
        prompt=request.prompt,
        media=tuple(_media_item(part) for part in request.media),
        sampling=_sampling(request, request.max_tokens, defaults),
        stop=request.stop_strings,
    )


def _sampling(
    request: ChatRequest | CompletionRequest, max_tokens: int | None, defaults: SamplingDefaults
) -> SamplingParams:
    temperature, top_p, top_k = request.temperature, request.top_p, request.top_k
    eos_token_ids = frozenset() if request.ignore_eos else defaults.eos_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=defaults.temperature if temperature is None else temperature,
        top_p=defaults.top_p if top_p is None else top_p,
        # Other servers take -1 for "all".
        top_k=defaults.top_k if top_k is None else max(top_k, 0),
        seed=request.seed,
        stop_token_ids=eos_token_ids | frozenset(request.stop_token_ids),
        logprobs=request.num_logprobs,
        repetition_penalty=defaults.repetition_penalty,
        min_p=defaults.min_p,
    )


def _template_message(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: of media only their kind, without URL."""
    # OpenAI's newer name for the same role, which templates do not know: they would leave the message out silently.
    role = "system" if message.role == "developer" else message.role
    if not isinstance(message.content, list):
        return {"role": role, "content": message.content or ""}
    content = [
        {"type": "text", "text": part.text} if isinstance(part, TextPart) else {"type": part.type.removesuffix("_url")}
        for part in message.content
    ]
    return {"role": role, "content": content}


def _media_item(part: ImagePart | VideoPart) -> MediaItem:
    if isinstance(part, VideoPart):
        return item_from_url("video", part.video_url.url, part.video_url.fps)
    return item_from_url("image", part.image_url.url, None)
