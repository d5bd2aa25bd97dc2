"""Turns an OpenAI request into a GenerationRequest: messages into text, content parts into media items and so on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, TypedDict, TypeVar

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.frontend.grammar_types import only_grammar
from vitrine_vlm.llm_worker.frontend.media_parts import MediaContent, media_items
from vitrine_vlm.llm_worker.frontend.openai_types import (
    ChatRequest,
    CompletionRequest,
    GenerationBody,
    Message,
    TextPart,
)
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.prompt.client_text import ChatText
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer

NumberT = TypeVar("NumberT", int, float)


def chat_text(messages: Sequence[Message], tokenizer: PromptTokenizer) -> ChatText:
    """The prompt, with one placeholder a media item.

    Raises:
        BadRequest: a template that refuses the messages.
    """
    return tokenizer.render_chat(Chat([_template_message(message) for message in messages]))


def chat_to_generation(
    request: ChatRequest, tokenizer: PromptTokenizer | None, defaults: SamplingDefaults, request_id: str
) -> GenerationRequest:
    """
    Raises:
        BadRequest: see `messages_to_generation`.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    return messages_to_generation(request, request.messages, max_tokens, tokenizer, defaults, f"chatcmpl-{request_id}")


def messages_to_generation(
    request: GenerationBody,
    messages: Sequence[Message],
    max_tokens: int | None,
    tokenizer: PromptTokenizer | None,
    defaults: SamplingDefaults,
    request_id: str,
) -> GenerationRequest:
    """
    Raises:
        BadRequest: no tokenizer, a template that refuses the messages, a word that has no tokens, several grammars, a
            malformed data: URL, or options of media that contradict each other.
    """
    if tokenizer is None:
        raise BadRequest("this worker runs without a tokenizer: send token ids to /v1/completions")
    return GenerationRequest(
        request_id=request_id,
        prompt=chat_text(messages, tokenizer),
        media=media_items(list(_media_of(messages)), request.media_options),
        sampling=_sampling(request, max_tokens, tokenizer, defaults),
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        **_text_options(request),
    )


def completion_to_generations(
    request: CompletionRequest, tokenizer: PromptTokenizer | None, defaults: SamplingDefaults, request_id: str
) -> list[GenerationRequest]:
    """Returns a generation for each prompt.

    Raises:
        BadRequest: words without a tokenizer or without tokens, several grammars, a malformed data: URL, or media for
            several prompts.
    """
    prompts = request.prompts
    if len(prompts) > 1 and request.media:
        raise BadRequest(
            f"media: {len(prompts)} prompts cannot share media: send each in a request of its own", "media"
        )
    sampling = _sampling(request, request.max_tokens, tokenizer, defaults)
    parts = [(f"media.{index}", part) for index, part in enumerate(request.media)]
    media = media_items(parts, request.media_options)
    return [
        GenerationRequest(
            request_id=f"cmpl-{request_id}" + (f"-prompt-{number}" if number else ""),
            prompt=prompt,
            media=media,
            sampling=sampling,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
            **_text_options(request),
        )
        for number, prompt in enumerate(prompts)
    ]


class _TextOptions(TypedDict):
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    grammar_field: str


def _text_options(request: GenerationBody) -> _TextOptions:
    return {
        "stop": request.stop_strings,
        "include_stop_str_in_output": request.include_stop_str_in_output or request.no_stop_trim,
        "skip_special_tokens": request.skip_special_tokens,
        "grammar_field": only_grammar(request.grammars()).field,
    }


def _sampling(
    request: GenerationBody, max_tokens: int | None, tokenizer: PromptTokenizer | None, defaults: SamplingDefaults
) -> SamplingParams:
    top_k = _given(request.top_k, defaults.top_k)
    eos_token_ids = frozenset() if request.ignore_eos else defaults.eos_token_ids
    allowed = request.allowed_token_ids
    return SamplingParams(
        max_tokens=max_tokens,
        temperature=_given(request.temperature, defaults.temperature),
        top_p=_given(request.top_p, defaults.top_p),
        top_k=max(top_k, 0),  # other servers take -1 for "all"
        seed=request.seed,
        stop_token_ids=eos_token_ids | frozenset(request.stop_token_ids),
        logprobs=request.num_logprobs,
        prompt_logprobs=request.num_prompt_logprobs,
        repetition_penalty=_given(request.repetition_penalty, defaults.repetition_penalty),
        min_p=_given(request.min_p, defaults.min_p),
        min_tokens=request.min_tokens,
        presence_penalty=request.presence_penalty,
        frequency_penalty=request.frequency_penalty,
        logit_bias=request.logit_bias,
        bad_words=_bad_words(request.bad_words, tokenizer),
        allowed_token_ids=None if allowed is None else frozenset(allowed),
        grammar=only_grammar(request.grammars()).grammar,
    )


def _given(value: NumberT | None, default: NumberT) -> NumberT:
    return default if value is None else value


def _bad_words(words: Sequence[str], tokenizer: PromptTokenizer | None) -> tuple[tuple[int, ...], ...]:
    if not words:
        return ()
    if tokenizer is None:
        raise BadRequest("bad_words: this worker runs without a tokenizer, and knows no words", "bad_words")
    return tokenizer.bad_word_ids(words)


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


def _media_of(messages: Sequence[Message]) -> Iterator[tuple[str, MediaContent]]:
    """Each part with media, with its place in the request."""
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content if isinstance(message.content, list) else []):
            if not isinstance(part, TextPart):
                yield f"messages.{number}.content.{index}", part
