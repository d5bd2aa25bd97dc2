"""Sampling parameters over gRPC: every field arrives as it was sent, and clients that know none of them still work."""

from __future__ import annotations

from vitrine_vlm.llm_worker.engine.request import SamplingParams
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.wire import generation_from_proto, sampling_to_proto
from vitrine_vlm.protos.llm.v1 import llm_pb2

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
    return generation_from_proto("", llm_pb2.Prompt(text="x"), sent, DEFAULTS).sampling


def test_every_field_arrives() -> None:
    """Also where a field's neutral value is not the checkpoint's default."""
    assert received(sampling_to_proto(EVERY_FIELD)) == EVERY_FIELD
    assert received(sampling_to_proto(SamplingParams())) == SamplingParams(temperature=1.0, top_p=1.0, top_k=0)


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
    old = generation_from_proto("", prompt, llm_pb2.SamplingParams(), DEFAULTS)
    assert (old.include_stop_str_in_output, old.skip_special_tokens, old.truncate_prompt_tokens) == (False, True, None)
    sent = llm_pb2.SamplingParams(include_stop_str_in_output=True, skip_special_tokens=False, truncate_prompt_tokens=-1)
    new = generation_from_proto("", prompt, sent, DEFAULTS)
    assert (new.include_stop_str_in_output, new.skip_special_tokens, new.truncate_prompt_tokens) == (True, False, -1)
