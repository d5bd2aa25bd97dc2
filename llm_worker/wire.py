"""Converts between the messages of llm.proto and plain values, and checks what clients send."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import asdict

from vitrine_vlm.embedding_transport.wire.frame_lists import add_frames, frames_from_message
from vitrine_vlm.embedding_transport.wire.messages import options_from_message, options_to_fields
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.grammar import (
    ChoiceGrammar,
    EbnfGrammar,
    Grammar,
    JsonGrammar,
    RegexGrammar,
    ToolGrammar,
)
from vitrine_vlm.llm_worker.engine.request import SamplingParams, TokenLogprobs
from vitrine_vlm.llm_worker.engine.sampling_checks import MAX_BAD_WORDS, MAX_LOGIT_BIAS_TOKENS, check_number
from vitrine_vlm.llm_worker.generation.events import (
    Delta,
    Finished,
    GenerationRequest,
    PromptLogprobs,
    StageTimings,
    Started,
)
from vitrine_vlm.llm_worker.generation.stop_strings import MAX_STOP_STRINGS
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.service_runtime.json_limits import MAX_VALUES
from vitrine_vlm.service_runtime.tenants import MAX_SALT_LENGTH, CacheScope
from vitrine_vlm.types import MediaItem, MediaKind

_MAX_UINT32 = 2**32 - 1
_KINDS: dict[int, MediaKind] = {llm_pb2.MEDIA_KIND_IMAGE: "image", llm_pb2.MEDIA_KIND_VIDEO: "video"}
_KIND_TO_PROTO: dict[MediaKind, llm_pb2.MediaKind.ValueType] = {
    "image": llm_pb2.MEDIA_KIND_IMAGE,
    "video": llm_pb2.MEDIA_KIND_VIDEO,
}


def generation_from_proto(
    request_id: str,
    prompt: llm_pb2.Prompt,
    sampling: llm_pb2.SamplingParams,
    defaults: SamplingDefaults,
    scope: CacheScope,
) -> GenerationRequest:
    """
    Raises:
        BadRequest: a prompt or media item without content, or a field with too many entries.
    """
    kind = prompt.WhichOneof("prompt")
    if kind is None:
        raise BadRequest("the prompt is missing: set text or token_ids")
    # Before they are copied, with those that they have twice.
    check_number("token_ids", len(prompt.token_ids.ids), MAX_VALUES)
    check_number("stop", len(sampling.stop), MAX_STOP_STRINGS)
    check_number("stop_token_ids", len(sampling.stop_token_ids), MAX_VALUES)
    check_number("logit_bias", len(sampling.logit_bias), MAX_LOGIT_BIAS_TOKENS)
    check_number("bad_words", len(sampling.bad_words), MAX_BAD_WORDS)
    check_number("allowed_token_ids", len(sampling.allowed_token_ids.ids), MAX_VALUES)
    return GenerationRequest(
        request_id=request_id or uuid.uuid4().hex,
        prompt=prompt.text if kind == "text" else list(prompt.token_ids.ids),
        media=tuple(_media_item(index, item) for index, item in enumerate(prompt.media)),
        sampling=_sampling(sampling, defaults),
        stop=tuple(sampling.stop),
        include_stop_str_in_output=sampling.include_stop_str_in_output,
        skip_special_tokens=sampling.skip_special_tokens if sampling.HasField("skip_special_tokens") else True,
        truncate_prompt_tokens=sampling.truncate_prompt_tokens or None,
        grammar_field=f"sampling.grammar.{sampling.grammar.WhichOneof('grammar')}",
        tool_fields=tuple(
            f"sampling.grammar.tool_calls.tools.{index}" for index in range(len(sampling.grammar.tool_calls.tools))
        ),
        scope=scope,
    )


def checked_salt(cache_salt: str) -> str:
    """
    Raises:
        BadRequest: it is too long.
    """
    if len(cache_salt) > MAX_SALT_LENGTH:
        raise BadRequest(
            f"cache_salt has {len(cache_salt)} characters: at most {MAX_SALT_LENGTH} are accepted", "cache_salt"
        )
    return cache_salt


def _media_item(index: int, item: llm_pb2.MediaItem) -> MediaItem:
    source = item.WhichOneof("source")
    if source is None or item.kind not in _KINDS:
        raise BadRequest(f"media item {index} needs a kind and one of url, data and frames")
    kind = _KINDS[item.kind]
    if kind == "image" and source == "frames":
        raise BadRequest(f"media item {index} is an image and has frames: send them as a video")
    return MediaItem(
        kind,
        url=item.url if source == "url" else None,
        data=item.data if source == "data" else None,
        frames=frames_from_message(f"media item {index}", item.frames) if source == "frames" else None,
        options=options_from_message(item.options, item.video_fps),
    )


def _sampling(sampling: llm_pb2.SamplingParams, defaults: SamplingDefaults) -> SamplingParams:
    allowed = sampling.allowed_token_ids.ids if sampling.HasField("allowed_token_ids") else None
    eos_token_ids = frozenset() if sampling.ignore_eos else defaults.eos_token_ids
    return SamplingParams(
        max_tokens=sampling.max_tokens or None,
        temperature=sampling.temperature if sampling.HasField("temperature") else defaults.temperature,
        top_p=sampling.top_p if sampling.HasField("top_p") else defaults.top_p,
        top_k=sampling.top_k if sampling.HasField("top_k") else defaults.top_k,
        seed=sampling.seed if sampling.HasField("seed") else None,
        stop_token_ids=eos_token_ids | frozenset(sampling.stop_token_ids),
        logprobs=sampling.logprobs if sampling.HasField("logprobs") else None,
        min_p=sampling.min_p if sampling.HasField("min_p") else defaults.min_p,
        min_tokens=sampling.min_tokens,
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=(
            sampling.repetition_penalty if sampling.HasField("repetition_penalty") else defaults.repetition_penalty
        ),
        logit_bias=dict(sampling.logit_bias),
        bad_words=tuple(tuple(word.ids) for word in sampling.bad_words),
        allowed_token_ids=frozenset(allowed) if allowed is not None else None,
        prompt_logprobs=sampling.prompt_logprobs if sampling.HasField("prompt_logprobs") else None,
        grammar=_grammar(sampling.grammar) if sampling.HasField("grammar") else None,
    )


def _grammar(message: llm_pb2.Grammar) -> Grammar:
    match message.WhichOneof("grammar"):
        case "json_schema":
            return JsonGrammar(message.json_schema)
        case "regex":
            return RegexGrammar(message.regex)
        case "choices":
            if not message.choices.texts:
                raise BadRequest("choices has no texts: send one at least", "sampling.grammar.choices")
            return ChoiceGrammar(tuple(message.choices.texts))
        case "ebnf":
            return EbnfGrammar(message.ebnf)
        case "tool_calls":
            calls = message.tool_calls
            if not calls.tools:
                raise BadRequest("tool_calls has no tools: send one at least", "sampling.grammar.tool_calls")
            tools = tuple((each.name, each.parameters) for each in calls.tools)
            return ToolGrammar(tools, calls.at_least_one, calls.parallel)
        case _:
            raise BadRequest("the grammar is empty: set one of its fields", "sampling.grammar")


def _grammar_to_proto(grammar: Grammar) -> llm_pb2.Grammar:
    match grammar:
        case JsonGrammar(schema):
            return llm_pb2.Grammar(json_schema=schema)
        case RegexGrammar(pattern):
            return llm_pb2.Grammar(regex=pattern)
        case ChoiceGrammar(choices):
            return llm_pb2.Grammar(choices=llm_pb2.Choices(texts=choices))
        case EbnfGrammar(source):
            return llm_pb2.Grammar(ebnf=source)
        case ToolGrammar(tools, at_least_one, parallel):
            calls = [llm_pb2.Tool(name=name, parameters=parameters) for name, parameters in tools]
            tool_calls = llm_pb2.ToolCalls(tools=calls, at_least_one=at_least_one, parallel=parallel)
            return llm_pb2.Grammar(tool_calls=tool_calls)


def started_to_proto(started: Started, request_id: str) -> llm_pb2.Started:
    return llm_pb2.Started(
        request_id=request_id,
        num_prompt_tokens=started.num_prompt_tokens,
        num_media_tokens=started.num_media_tokens,
    )


def prompt_logprobs_to_proto(event: PromptLogprobs) -> llm_pb2.PromptLogprobs:
    return llm_pb2.PromptLogprobs(logprobs=[logprobs_to_proto(each) for each in event.logprobs if each is not None])


def delta_to_proto(delta: Delta) -> llm_pb2.Delta:
    logprobs = [logprobs_to_proto(each) for each in delta.logprobs]
    return llm_pb2.Delta(token_ids=delta.token_ids, text=delta.text, logprobs=logprobs)


def logprobs_to_proto(logprobs: TokenLogprobs) -> llm_pb2.TokenLogprobs:
    return llm_pb2.TokenLogprobs(
        sampled=llm_pb2.TokenLogprob(token_id=logprobs.token_id, logprob=logprobs.logprob),
        top=[llm_pb2.TokenLogprob(token_id=token_id, logprob=value) for token_id, value in logprobs.top],
    )


def finished_to_proto(finished: Finished) -> llm_pb2.Finished:
    return llm_pb2.Finished(
        finish_reason=finished.finish_reason,
        num_prompt_tokens=finished.num_prompt_tokens,
        num_completion_tokens=finished.num_completion_tokens,
        num_cached_tokens=finished.num_cached_tokens,
        timings=timings_to_proto(finished.timings),
    )


def timings_to_proto(timings: StageTimings) -> llm_pb2.StageTimings:
    return llm_pb2.StageTimings(**asdict(timings))


def logprobs_from_proto(message: llm_pb2.TokenLogprobs) -> TokenLogprobs:
    return TokenLogprobs(
        message.sampled.token_id,
        message.sampled.logprob,
        tuple((each.token_id, each.logprob) for each in message.top),
    )


def prompt_to_proto(token_ids: Sequence[int], media: Sequence[MediaItem]) -> llm_pb2.Prompt:
    return llm_pb2.Prompt(
        token_ids=llm_pb2.TokenIds(ids=token_ids), media=[_media_item_to_proto(item) for item in media]
    )


def _media_item_to_proto(item: MediaItem) -> llm_pb2.MediaItem:
    options = options_to_fields(item.options)
    message = llm_pb2.MediaItem(
        kind=_KIND_TO_PROTO[item.kind],
        video_fps=item.options.fps or 0.0,
        options=llm_pb2.MediaOptions(**options) if options else None,
    )
    if item.data is not None:
        message.data = item.data
    elif item.url is not None:
        message.url = item.url
    elif item.frames is not None:
        add_frames(message.frames, item.frames)
    return message


def sampling_to_proto(sampling: SamplingParams) -> llm_pb2.SamplingParams:
    """Sets every field of the answer's tokens, so that the receiver's defaults are not used."""
    allowed = sampling.allowed_token_ids
    # Numbers in JSON have no limit, these fields have 32 bits; larger values have the same effect as the largest.
    return llm_pb2.SamplingParams(
        max_tokens=min(sampling.max_tokens or 0, _MAX_UINT32),
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        top_k=min(sampling.top_k, _MAX_UINT32),
        seed=sampling.seed % 2**64 if sampling.seed is not None else None,
        stop_token_ids=sorted(each for each in sampling.stop_token_ids if 0 <= each <= _MAX_UINT32),
        ignore_eos=True,  # the model's end tokens are among the stop tokens
        logprobs=sampling.logprobs,
        min_p=sampling.min_p,
        min_tokens=min(sampling.min_tokens, _MAX_UINT32),
        presence_penalty=sampling.presence_penalty,
        frequency_penalty=sampling.frequency_penalty,
        repetition_penalty=sampling.repetition_penalty,
        logit_bias=sampling.logit_bias,
        bad_words=[llm_pb2.TokenIds(ids=word) for word in sampling.bad_words],
        allowed_token_ids=llm_pb2.TokenIds(ids=sorted(allowed)) if allowed is not None else None,
        grammar=_grammar_to_proto(sampling.grammar) if sampling.grammar is not None else None,
    )
