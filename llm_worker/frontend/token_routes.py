"""`/tokenize` and `/detokenize`: the served checkpoint's tokenizer, for clients that have none."""

from __future__ import annotations

import asyncio

from aiohttp import web

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.frontend.openai_prompt import request_chat
from vitrine_vlm.llm_worker.frontend.openai_types import DetokenizeRequest, TemplateBody, TokenizeRequest
from vitrine_vlm.llm_worker.frontend.request_parsing import read_request
from vitrine_vlm.llm_worker.frontend.served_models import ServedModels
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer


class TokenRoutes:
    """Handlers of both routes. A media item counts as its one placeholder: only an encoder knows its size."""

    def __init__(self, models: ServedModels, metrics: LlmMetrics) -> None:
        self._models = models
        self._metrics = metrics

    def add_to(self, application: web.Application) -> None:
        application.router.add_post("/tokenize", self._tokenize)
        application.router.add_post("/detokenize", self._detokenize)

    async def _tokenize(self, http: web.Request) -> web.Response:
        request = await read_request(TokenizeRequest, http, self._metrics.count_unused_fields)
        served = self._served(request.model)
        tokens, texts = await asyncio.to_thread(_tokenize, request, _tokenizer(served))
        return web.json_response(
            {
                "count": len(tokens),
                "max_model_len": served.generator.max_model_len,
                "tokens": tokens,
                "token_strs": texts,
            }
        )

    async def _detokenize(self, http: web.Request) -> web.Response:
        request = await read_request(DetokenizeRequest, http, self._metrics.count_unused_fields)
        served = self._served(request.model)
        tokenizer, vocab_size = _tokenizer(served), served.generator.vocab_size
        if request.tokens and max(request.tokens) >= vocab_size:
            raise BadRequest(f"tokens: token ids must be in 0..{vocab_size - 1}, got {max(request.tokens)}", "tokens")
        text = await asyncio.to_thread(tokenizer.decode, request.tokens, request.skip_special_tokens)
        return web.json_response({"prompt": text})

    def _served(self, name: str | None) -> ServedModel:
        return self._models.get() if name is None else self._models.named(name)


def _tokenize(request: TokenizeRequest, tokenizer: PromptTokenizer) -> tuple[list[int], list[str] | None]:
    """Returns the tokens, and the text of each where the request asks for it."""
    if request.prompt is not None:
        _check_no_template(request)
        tokens = tokenizer.encode(request.prompt)
    else:
        tokens = tokenizer.encode_chat(tokenizer.render_chat(request_chat(request, request.messages or [])))
    return tokens, [tokenizer.text_of(each) for each in tokens] if request.return_token_strs else None


def _check_no_template(request: TokenizeRequest) -> None:
    """
    Raises:
        BadRequest: a field of chat templates has a value, and there is no template.
    """
    for name, field in TemplateBody.model_fields.items():
        value = getattr(request, name)
        if value != field.default and not (name == "add_generation_prompt" and value):
            raise BadRequest(f"{name}: it is for chat templates: send messages instead of prompt", name)


def _tokenizer(served: ServedModel) -> PromptTokenizer:
    if served.generator.tokenizer is None:
        raise BadRequest("this worker runs without a tokenizer")
    return served.generator.tokenizer
