"""`/tokenize` and `/detokenize`: the served checkpoint's tokenizer, for clients that have none."""

from __future__ import annotations

import asyncio
import json
from functools import partial

from aiohttp import web

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.frontend.openai_prompt import request_chat
from vitrine_vlm.llm_worker.frontend.openai_types import DetokenizeRequest, TemplateBody, TokenizeRequest
from vitrine_vlm.llm_worker.frontend.request_parsing import read_request, with_body, with_template
from vitrine_vlm.llm_worker.frontend.served_models import ServedModels
from vitrine_vlm.llm_worker.generation.served_model import ServedModel
from vitrine_vlm.llm_worker.metrics import LlmMetrics
from vitrine_vlm.llm_worker.prompt.client_text import ChatText
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
        tokenizer = _tokenizer(served)
        run = with_body if request.chat_template is None else with_template
        prompt = await run(http, partial(_prompt, request, tokenizer))
        assert served.generator.tokenization is not None  # as there is a tokenizer
        served.generator.tokenization.check_length(prompt)
        tokens = await served.generator.tokenization.all_ids(prompt)
        head = {"count": len(tokens), "max_model_len": served.generator.max_model_len}
        body = await asyncio.to_thread(_answer, head, tokens, tokenizer if request.return_token_strs else None)
        return web.Response(body=body, content_type="application/json")

    async def _detokenize(self, http: web.Request) -> web.Response:
        request = await read_request(DetokenizeRequest, http, self._metrics.count_unused_fields)
        served = self._served(request.model)
        tokenizer, vocab_size = _tokenizer(served), served.generator.vocab_size
        if request.tokens and max(request.tokens) >= vocab_size:
            raise BadRequest(f"tokens: token ids must be in 0..{vocab_size - 1}, got {max(request.tokens)}", "tokens")
        body = await asyncio.to_thread(_text, request, tokenizer)
        return web.Response(body=body, content_type="application/json")

    def _served(self, name: str | None) -> ServedModel:
        return self._models.get() if name is None else self._models.named(name)


def _prompt(request: TokenizeRequest, tokenizer: PromptTokenizer) -> str | ChatText:
    if request.prompt is None:
        return tokenizer.render_chat(request_chat(request, request.messages or []))
    _check_no_template(request)
    return request.prompt


def _answer(head: dict[str, int], tokens: list[int], tokenizer: PromptTokenizer | None) -> bytes:
    """The answer's JSON, with the text of each token where there is a tokenizer.

    It is written in pieces, as `json` writes a whole list while no other thread runs.
    """
    numbers = ", ".join(str(each) for each in tokens)
    texts = "null"
    if tokenizer is not None:
        texts = f"[{', '.join(json.dumps(tokenizer.text_of(each)) for each in tokens)}]"
    return f'{json.dumps(head)[:-1]}, "tokens": [{numbers}], "token_strs": {texts}}}'.encode()


def _text(request: DetokenizeRequest, tokenizer: PromptTokenizer) -> bytes:
    return json.dumps({"prompt": tokenizer.decode(request.tokens, request.skip_special_tokens)}).encode()


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
