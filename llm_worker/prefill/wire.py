"""Converts between the messages of prefill.proto and plain values."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from vitrine_vlm.embedding_transport.wire.messages import duration_ms
from vitrine_vlm.llm_worker.engine.sampler import NextToken
from vitrine_vlm.llm_worker.generation.events import FirstToken, GenerationRequest, Started
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat
from vitrine_vlm.llm_worker.wire import logprobs_from_proto, logprobs_to_proto, prompt_to_proto, sampling_to_proto
from vitrine_vlm.protos.llm.v1 import llm_pb2
from vitrine_vlm.protos.prefill.v1 import prefill_pb2
from vitrine_vlm.types import ItemTimings


@dataclass(frozen=True)
class Prefilled:
    """A prompt that a prefill worker has computed.

    first: the first token. media_timings: of the slowest items. prefill_ms, num_cached_tokens: see EngineTimings.
    """

    num_prompt_tokens: int
    first: NextToken
    media_timings: ItemTimings
    prefill_ms: float
    num_cached_tokens: int


def format_to_proto(kv_format: KvFormat) -> prefill_pb2.KvFormat:
    return prefill_pb2.KvFormat(**asdict(kv_format))


def format_from_proto(message: prefill_pb2.KvFormat) -> KvFormat:
    return KvFormat(
        model=message.model,
        revision=message.revision,
        model_type=message.model_type,
        dtype=message.dtype,
        num_layers=message.num_layers,
        num_key_value_heads=message.num_key_value_heads,
        head_dim=message.head_dim,
        protocol_version=message.protocol_version,
    )


def request_to_proto(
    request: GenerationRequest,
    token_ids: list[int],
    session_id: str,
    kv_format: KvFormat,
    first_row: int,
    call_id: int,
) -> prefill_pb2.PrefillRequest:
    """
    Args:
        token_ids: the request's prompt, tokenized. first_row: the first KV row that is needed.
        call_id: another one for each call of the session.
    """
    return prefill_pb2.PrefillRequest(
        request_id=request.request_id,
        session_id=session_id,
        format=format_to_proto(kv_format),
        prompt=prompt_to_proto(token_ids, request.media),
        sampling=sampling_to_proto(request.sampling),
        first_row=first_row,
        tenant=request.scope.tenant,
        cache_salt=request.scope.salt,
        call_id=call_id,
    )


def prefilled_to_proto(known: Started, first: FirstToken) -> prefill_pb2.Prefilled:
    return prefill_pb2.Prefilled(
        num_prompt_tokens=known.num_prompt_tokens,
        token_id=first.token_ids[0],
        logprobs=logprobs_to_proto(first.logprobs[0]) if first.logprobs else None,
        timings=llm_pb2.StageTimings(**asdict(first.timings)),
        num_cached_tokens=first.num_cached_tokens,
    )


def prefilled_from_proto(message: prefill_pb2.Prefilled) -> Prefilled:
    timings = message.timings
    logprobs = logprobs_from_proto(message.logprobs) if message.HasField("logprobs") else None
    return Prefilled(
        num_prompt_tokens=message.num_prompt_tokens,
        first=NextToken(message.token_id, logprobs),
        media_timings=ItemTimings(
            load_ms=duration_ms(timings.load_ms),
            preprocess_ms=duration_ms(timings.preprocess_ms),
            forward_ms=duration_ms(timings.encode_ms),
            ship_ms=duration_ms(timings.ship_ms),
        ),
        prefill_ms=duration_ms(timings.prefill_ms),
        num_cached_tokens=message.num_cached_tokens,
    )
