"""Requests over gRPC: every field arrives as it was sent, and clients that know none of them still work."""

from __future__ import annotations

from dataclasses import asdict

import pytest

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.grammar import (
    ChoiceGrammar,
    EbnfGrammar,
    Grammar,
    JsonGrammar,
    RegexGrammar,
    ToolGrammar,
)
from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.wire import generation_from_proto, prompt_to_proto, sampling_to_proto
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.service_runtime.tenants import CacheScope
from vitrine_vlm.types import MAX_LISTED_FRAMES, MediaItem, MediaOptions

DEFAULTS = SamplingDefaults(0.7, 0.8, 20, frozenset([258]), repetition_penalty=1.05, min_p=0.1)
EVERY_FIELD = SamplingParams(
    max_tokens=9,
    temperature=0.5,
    top_p=0.25,
    top_k=3,
    seed=2**64 - 1,
    stop_token_ids=frozenset([5, 6]),
    logprobs=0,
    min_p=0.0,
    min_tokens=4,
    presence_penalty=-1.5,
    frequency_penalty=0.5,
    repetition_penalty=1.0,
    logit_bias={7: -100.0, 0: 2.5},
    bad_words=((1,), (2, 3)),
    allowed_token_ids=frozenset([0, 1, 9]),
)


def received(sampling: llm_pb2.SamplingParams) -> SamplingParams:
    sent = llm_pb2.SamplingParams.FromString(sampling.SerializeToString())
    return generation_from_proto("", llm_pb2.Prompt(text="x"), sent, DEFAULTS, CacheScope()).sampling


def test_every_field_arrives() -> None:
    """Also where a field's neutral value is not the checkpoint's default."""
    assert received(sampling_to_proto(EVERY_FIELD)) == EVERY_FIELD
    assert received(sampling_to_proto(SamplingParams())) == SamplingParams(temperature=1.0, top_p=1.0, top_k=0)


GRAMMARS: list[Grammar] = [
    JsonGrammar('{"type": "object"}'),
    RegexGrammar(""),
    ChoiceGrammar(("a", "", "b c")),
    EbnfGrammar('root ::= "a"'),
    ToolGrammar((("f", "{}"), ("g", '{"type": "object"}')), at_least_one=True, parallel=False),
    ToolGrammar((("f", "{}"),), at_least_one=False, parallel=True),
]


@pytest.mark.parametrize("grammar", GRAMMARS, ids=lambda grammar: type(grammar).__name__)
def test_grammars_arrive(grammar: Grammar) -> None:
    assert received(sampling_to_proto(SamplingParams(grammar=grammar))).grammar == grammar


@pytest.mark.parametrize(
    ("grammar", "param"),
    [
        (llm_pb2.Grammar(), "sampling.grammar"),
        (llm_pb2.Grammar(choices=llm_pb2.Choices()), "sampling.grammar.choices"),
        (llm_pb2.Grammar(tool_calls=llm_pb2.ToolCalls(parallel=True)), "sampling.grammar.tool_calls"),
    ],
)
def test_grammars_without_content_are_refused(grammar: llm_pb2.Grammar, param: str) -> None:
    with pytest.raises(BadRequest) as caught:
        received(llm_pb2.SamplingParams(grammar=grammar))
    assert caught.value.param == param


def test_fields_that_a_client_does_not_know_are_neutral_or_the_checkpoints() -> None:
    assert received(llm_pb2.SamplingParams()) == SamplingParams(
        temperature=0.7,
        top_p=0.8,
        top_k=20,
        stop_token_ids=frozenset([258]),
        repetition_penalty=1.05,
        min_p=0.1,
    )


def test_an_empty_list_of_allowed_tokens_is_not_left_out() -> None:
    assert received(llm_pb2.SamplingParams(allowed_token_ids=llm_pb2.TokenIds())).allowed_token_ids == frozenset()


def test_numbers_without_a_limit_are_sent_as_the_largest() -> None:
    sent = sampling_to_proto(SamplingParams(max_tokens=None, min_tokens=2**40, top_k=2**40))
    assert (sent.min_tokens, sent.top_k) == (2**32 - 1, 2**32 - 1)


def test_fields_of_text_arrive_and_are_left_out_by_old_clients() -> None:
    prompt = llm_pb2.Prompt(text="x")
    old = generation_from_proto("", prompt, llm_pb2.SamplingParams(), DEFAULTS, CacheScope())
    assert (old.include_stop_str_in_output, old.skip_special_tokens, old.truncate_prompt_tokens) == (False, True, None)
    sent = llm_pb2.SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False, truncate_prompt_tokens=-1)
    new = generation_from_proto("", prompt, sent, DEFAULTS, CacheScope())
    assert (new.include_stop_str_in_output, new.skip_special_tokens, new.truncate_prompt_tokens) == (True, False, -1)


def media_sent(*items: MediaItem) -> tuple[MediaItem, ...]:
    prompt = llm_pb2.Prompt.FromString(prompt_to_proto([1], items).SerializeToString())
    return generation_from_proto("", prompt, llm_pb2.SamplingParams(), DEFAULTS, CacheScope()).media


def test_options_and_frames_of_media_arrive() -> None:
    options = MediaOptions(1, 2**40, 0.5, 4, 5, 6, False, 0.0, 2.5)
    assert None not in asdict(options).values(), "a field is not tried"
    frames = (MediaItem("image", data=b""), MediaItem("image", url="http://a"))
    items = (
        MediaItem("image", data=b"x"),
        MediaItem("video", url="http://a", options=options),
        MediaItem("video", frames=frames, options=MediaOptions(fps=2.0)),
    )
    assert media_sent(*items) == items


@pytest.mark.parametrize(
    "item",
    [
        llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_VIDEO),
        llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_VIDEO, frames=llm_pb2.Frames()),
        llm_pb2.MediaItem(
            kind=llm_pb2.MEDIA_KIND_VIDEO, frames=llm_pb2.Frames(frames=[llm_pb2.Frame()] * (MAX_LISTED_FRAMES + 1))
        ),
        llm_pb2.MediaItem(kind=llm_pb2.MEDIA_KIND_IMAGE, frames=llm_pb2.Frames(frames=[llm_pb2.Frame(data=b"x")])),
    ],
    ids=["no source", "no frames", "many frames", "frames of an image"],
)
def test_media_without_a_source_are_refused(item: llm_pb2.MediaItem) -> None:
    with pytest.raises(BadRequest, match="media item 0"):
        generation_from_proto(
            "", llm_pb2.Prompt(text="x", media=[item]), llm_pb2.SamplingParams(), DEFAULTS, CacheScope()
        )
