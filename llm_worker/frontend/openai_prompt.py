"""Turns an OpenAI request into a GenerationRequest: messages into text, content parts into media items and so on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
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
    TemplateBody,
    TextPart,
)
from vitrine_vlm.llm_worker.frontend.tool_calls import OfferedTools
from vitrine_vlm.llm_worker.generation.events import GenerationRequest
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.service_runtime.tenants import CacheScope

# Other names of roles, which templates do not know: they would leave the message out silently.
_TEMPLATE_ROLES = {"developer": "system", "function": "tool"}
NumberT = TypeVar("NumberT", int, float)


def request_chat(request: TemplateBody, messages: Sequence[Message]) -> Chat:
    """What the chat template gets of a request.

    Raises:
        BadRequest: see `offered_tools`.
    """
    tools = request.offered_tools
    variables = dict(request.chat_template_kwargs)
    if request.reasoning_effort is not None:
        variables.setdefault("reasoning_effort", request.reasoning_effort)
    return Chat(
        template_messages(messages),
        tools=tools.for_template() if tools is not None else [],
        documents=request.documents,
        template=request.chat_template,
        variables=variables,
        add_generation_prompt=request.add_generation_prompt is not False,
        continue_final_message=request.continue_final_message,
    )


def template_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages as chat templates expect them: of media only their kind, without URL."""
    return [_template_message(message) for message in messages]


def chat_to_generation(
    request: ChatRequest, tokenizer: PromptTokenizer | None, defaults: SamplingDefaults, request_id: str
) -> GenerationRequest:
    """
    Raises:
        BadRequest: see `messages_to_generation` and `request_chat`.
    """
    max_tokens = request.max_completion_tokens or request.max_tokens
    chat, tools = request_chat(request, request.messages), request.offered_tools
    return messages_to_generation(
        request,
        list(_media_of(request.messages)),
        chat,
        tools,
        max_tokens,
        tokenizer,
        defaults,
        f"chatcmpl-{request_id}",
    )


def messages_to_generation(
    request: GenerationBody,
    media: Sequence[tuple[str, MediaContent]],
    chat: Chat,
    tools: OfferedTools | None,
    max_tokens: int | None,
    tokenizer: PromptTokenizer | None,
    defaults: SamplingDefaults,
    request_id: str,
) -> GenerationRequest:
    """
    Args:
        media: of the messages, each with its place in the request.
        chat: the messages for the chat template.
        tools: that the answer may call.

    Raises:
        BadRequest: no tokenizer, a template that refuses the messages, a word that has no tokens, several grammars, a
            malformed data: URL, options of media that contradict each other, or tools beside another form of the
            answer.
    """
    if tokenizer is None:
        raise BadRequest("this worker runs without a tokenizer: send token ids to /v1/completions")
    generation = GenerationRequest(
        request_id=request_id,
        prompt=tokenizer.render_chat(chat),
        media=media_items(media, request.media_options),
        sampling=_sampling(request, max_tokens, tokenizer, defaults),
        truncate_prompt_tokens=request.truncate_prompt_tokens,
        **_shared_fields(request),
    )
    return with_tools(generation, tools)


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
    prompt_only = request.max_tokens == 0
    sampling = _sampling(request, 1 if prompt_only else request.max_tokens, tokenizer, defaults)
    parts = [(f"media.{index}", part) for index, part in enumerate(request.media)]
    media = media_items(parts, request.media_options)
    return [
        GenerationRequest(
            request_id=f"cmpl-{request_id}" + (f"-prompt-{number}" if number else ""),
            prompt=prompt,
            media=media,
            sampling=sampling,
            truncate_prompt_tokens=request.truncate_prompt_tokens,
            prompt_only=prompt_only,
            **_shared_fields(request),
        )
        for number, prompt in enumerate(prompts)
    ]


class _SharedFields(TypedDict):
    stop: tuple[str, ...]
    include_stop_str_in_output: bool
    skip_special_tokens: bool
    grammar_field: str
    scope: CacheScope


def _shared_fields(request: GenerationBody) -> _SharedFields:
    return {
        "stop": request.stop_strings,
        "include_stop_str_in_output": request.include_stop_str_in_output or request.no_stop_trim,
        "skip_special_tokens": request.skip_special_tokens,
        "grammar_field": only_grammar(request.grammars()).field,
        "scope": request.cache_scope,
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


def with_tools(generation: GenerationRequest, tools: OfferedTools | None) -> GenerationRequest:
    """The generation, with the grammar of the tools.

    Raises:
        BadRequest: the model may choose tools, and the answer has another grammar already.
    """
    if tools is None:
        return generation
    field = generation.grammar_field
    if generation.sampling.grammar is not None and tools.choice.mode == "auto":
        raise BadRequest(
            f'{field}: an answer of this form cannot call tools: send tool_choice "none" or "required"', field
        )
    sampling = replace(generation.sampling, grammar=tools.grammar())
    field = "functions" if tools.legacy else "tools"
    return replace(generation, sampling=sampling, grammar_field=field, tool_fields=tools.fields)


def _template_message(message: Message) -> dict[str, Any]:
    fields: dict[str, Any] = {"role": _TEMPLATE_ROLES.get(message.role, message.role), "content": message.content or ""}
    if isinstance(message.content, list):
        fields["content"] = [
            {"type": "text", "text": part.text}
            if isinstance(part, TextPart)
            else {"type": part.type.removesuffix("_url")}
            for part in message.content
        ]
    if message.calls:
        fields["tool_calls"] = [call.model_dump(exclude_none=True) for call in message.calls]
    if message.name is not None:
        fields["name"] = message.name
    if message.tool_call_id is not None:
        fields["tool_call_id"] = message.tool_call_id
    return fields


def _media_of(messages: Sequence[Message]) -> Iterator[tuple[str, MediaContent]]:
    """Each part with media, with its place in the request."""
    for number, message in enumerate(messages):
        for index, part in enumerate(message.content if isinstance(message.content, list) else []):
            if not isinstance(part, TextPart):
                yield f"messages.{number}.content.{index}", part
