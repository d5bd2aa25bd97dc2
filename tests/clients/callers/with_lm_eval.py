"""lm-evaluation-harness' models for servers: its own requests, and what it reads from the answers."""

from __future__ import annotations

import base64
import io
import json
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.models.api_models import JsonChatStr
from lm_eval.models.openai_completions import LocalChatCompletion, LocalCompletionsAPI
from PIL import Image


def _completions(base_url: str, model: str, tokenizer: str, **options: Any) -> Any:
    options = {"tokenizer": tokenizer, "tokenizer_backend": "huggingface", **options}
    return LocalCompletionsAPI(base_url=f"{base_url}/completions", model=model, **options)


def _instances(kind: str, arguments: list[tuple[Any, ...]]) -> list[Instance]:
    return [Instance(request_type=kind, doc={}, arguments=each, idx=0) for each in arguments]


def loglikelihood(
    base_url: str, model: str, tokenizer: str, pairs: list[tuple[str, str]], **options: Any
) -> list[tuple[float, bool]]:
    """Of each context's continuation, and whether it is the greedy one."""
    requests = _instances("loglikelihood", [(context, continuation) for context, continuation in pairs])
    found: list[tuple[float, bool]] = _completions(base_url, model, tokenizer, **options).loglikelihood(requests)
    return found


def rolling(base_url: str, model: str, tokenizer: str, texts: list[str]) -> list[float]:
    """The log-likelihood of whole texts."""
    requests = _instances("loglikelihood_rolling", [(text,) for text in texts])
    found: list[float] = _completions(base_url, model, tokenizer).loglikelihood_rolling(requests)
    return found


def generate(base_url: str, model: str, tokenizer: str, contexts: list[str], **options: Any) -> list[str]:
    requests = _instances("generate_until", [(context, options) for context in contexts])
    found: list[str] = _completions(base_url, model, tokenizer).generate_until(requests)
    return found


def _chat(base_url: str, model: str) -> Any:
    return LocalChatCompletion(base_url=f"{base_url}/chat/completions", model=model)


def chat(base_url: str, model: str, messages: list[list[dict[str, Any]]], **options: Any) -> list[str]:
    requests = _instances("generate_until", [(JsonChatStr(json.dumps(each)), options) for each in messages])
    found: list[str] = _chat(base_url, model).generate_until(requests)
    return found


def chat_about_picture(base_url: str, model: str, question: str, picture: str, **options: Any) -> str:
    """picture: a PNG in base64."""
    image = Image.open(io.BytesIO(base64.b64decode(picture)))
    messages = JsonChatStr(json.dumps([{"role": "user", "content": question}]))
    requests = _instances("generate_until", [(messages, options, {"visual": [image]})])
    found: str = _chat(base_url, model).generate_until(requests)[0]
    return found
