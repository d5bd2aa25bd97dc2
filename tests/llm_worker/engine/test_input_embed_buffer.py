"""The decoder's inputs: text embeddings, media embeddings at their tokens, and nothing left of the last step."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.harness import input_buffer, request_state
from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.input_embed_buffer import InputEmbedBuffer
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.token_pool import TokenPool
from vitrine_vlm.llm_worker.families import build_decoder
from vitrine_vlm.llm_worker.models.decoder import StepInputs, TextDecoder
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

CPU = torch.device("cpu")
NUM_TOKENS = 12
SPANS = (MediaSpan(0, 3, 4, 0), MediaSpan(1, 8, 2, 0), MediaSpan(0, 10, 1, 4))


@pytest.fixture(scope="module")
def decoder(qwen3_vl_folder: Path) -> TextDecoder:
    return build_decoder(open_checkpoint(str(qwen3_vl_folder)), CPU, torch.float32)


@pytest.fixture
def cache(decoder: TextDecoder) -> KvCache:
    return KvCache(decoder.config, 16, 4, CPU, torch.float32)


def sequence(decoder: TextDecoder, cache: KvCache, spans: tuple[MediaSpan, ...] = SPANS) -> RequestState:
    positions = torch.arange(NUM_TOKENS).expand(3, -1) * 2
    width = decoder.config.hidden_size * (1 + decoder.config.num_deepstack)
    embeddings = [TensorRows(torch.randn(num_rows, width)) for num_rows in (5, 2)]
    made = request_state(ExpandedPrompt(list(range(40, 40 + NUM_TOKENS)), positions, 50, spans), embeddings)
    cache.append_slots(made.table, NUM_TOKENS + 4)
    return made


def expected(decoder: TextDecoder, sequence: RequestState) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings [tokens, C] and deepstack [N, tokens, C] of the whole prompt, row by row."""
    embeds = decoder.embed_tokens(torch.tensor(sequence.token_ids)).clone()
    hidden = embeds.shape[1]
    deepstack = torch.zeros(decoder.config.num_deepstack, *embeds.shape)
    for span in sequence.prompt.spans:
        rows = sequence.media.received[span.item_index]
        assert isinstance(rows, TensorRows)
        for offset in range(span.length):
            row = rows._rows_TW[span.first_row + offset].split(hidden)
            embeds[span.start + offset] = row[0]
            deepstack[:, span.start + offset] = torch.stack(row[1:])
    return embeds, deepstack


def write(buffer: InputEmbedBuffer, sequence: RequestState, start: int, stop: int) -> StepInputs:
    prepared = buffer.write([Chunk(sequence, start, stop, samples=False)])
    assert not prepared.failed
    return prepared.inputs


@pytest.mark.parametrize("cuts", [[0, 12], [0, 5, 9, 12], list(range(13))])
@torch.inference_mode()
def test_embeddings_land_at_their_tokens_wherever_chunks_are_cut(
    decoder: TextDecoder, cache: KvCache, cuts: list[int]
) -> None:
    buffer, one = input_buffer(decoder, 16), sequence(decoder, cache)
    embeds, deepstack = expected(decoder, one)
    for start, stop in pairwise(cuts):
        inputs = write(buffer, one, start, stop)
        assert torch.equal(inputs.embeds_TC, embeds[start:stop])
        if inputs.deepstack_NTC is None:
            assert not deepstack[:, start:stop].any()
        else:
            assert torch.equal(inputs.deepstack_NTC, deepstack[:, start:stop])
        assert torch.equal(inputs.positions_3T, torch.arange(start, stop).expand(3, -1) * 2)
        assert torch.equal(inputs.slot_mapping_T, one.table.slots[start:stop])


@torch.inference_mode()
def test_text_alone_brings_no_deepstack_and_media_leave_none_behind(decoder: TextDecoder, cache: KvCache) -> None:
    buffer, one, text = input_buffer(decoder, 32), sequence(decoder, cache), sequence(decoder, cache, spans=())
    assert write(buffer, one, 3, 7).deepstack_NTC is not None
    assert write(buffer, text, 0, 4).deepstack_NTC is None
    # Beside another's media, the text lies where media embeddings lay before.
    inputs = buffer.write([Chunk(text, 0, 6, samples=False), Chunk(one, 8, 10, samples=False)]).inputs
    assert inputs.deepstack_NTC is not None
    assert not inputs.deepstack_NTC[:, :6].any() and inputs.deepstack_NTC[:, 6:].any()


@torch.inference_mode()
def test_no_slot_of_an_earlier_step_is_left_behind_the_tokens(
    decoder: TextDecoder, cache: KvCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Graphs compute padding tokens, too, which must not write to the KV cache."""
    buffer, one, text = input_buffer(decoder, 16), sequence(decoder, cache), sequence(decoder, cache, spans=())
    assert buffer.slot_mapping_M.tolist() == [-1] * 16
    for start, stop in ((0, 12), (3, 5), (0, 7)):
        write(buffer, one, start, stop)
        assert buffer.slot_mapping_M[stop - start :].eq(-1).all()
    with monkeypatch.context() as patched, pytest.raises(RuntimeError):
        patched.setattr(buffer._staged, "copy_to_device", _fail)
        write(buffer, text, 0, 12)
    write(buffer, text, 0, 2)
    assert buffer.slot_mapping_M[2:].eq(-1).all() and buffer.slot_mapping_M[:2].ge(0).all()


def _fail() -> None:
    raise RuntimeError


@torch.inference_mode()
def test_generated_tokens_go_on_from_the_prompts_next_position(decoder: TextDecoder, cache: KvCache) -> None:
    one = sequence(decoder, cache)
    one.token_ids += [7, 8, 9]
    inputs = write(input_buffer(decoder, 16), one, NUM_TOKENS + 1, NUM_TOKENS + 2)
    assert inputs.positions_3T.tolist() == [[51]] * 3
    assert torch.equal(inputs.embeds_TC, decoder.embed_tokens(torch.tensor([8])))


@torch.inference_mode()
def test_tokens_that_the_host_does_not_know_yet_are_read_from_the_pool(decoder: TextDecoder, cache: KvCache) -> None:
    pool = TokenPool(8, CPU)
    buffer = InputEmbedBuffer(decoder, 16, 4, pool)
    known, one, other, prompt = (sequence(decoder, cache, spans=()) for _ in range(4))
    for each in (known, one, other, prompt):
        each.pool_row = pool.allocate()
    pool.write(torch.tensor([one.pool_row, other.pool_row, known.pool_row]), torch.tensor([71, 72, 73]))
    known.token_ids.append(7)
    for each in (one, other):
        each.sampled.num_in_flight = 1
    chunks = [Chunk(each, NUM_TOKENS, NUM_TOKENS + 1, samples=True) for each in (other, known, one)]
    prepared = buffer.write([chunks[0], Chunk(prompt, 0, 5, samples=False), *chunks[1:]])
    tokens = torch.tensor([72, 40, 41, 42, 43, 44, 7, 71])
    assert torch.equal(prepared.inputs.embeds_TC, decoder.embed_tokens(tokens))
    # Sampled tokens go to the same rows.
    assert prepared.sampled_tokens == buffer.sampled_tokens_S[:3].tolist() == [0, 6, 7]
    pool.write(buffer.sampled_pool_rows_S[:3], torch.tensor([1, 2, 3]))
    assert [int(pool.tokens_R[each.pool_row]) for each in (other, known, one, prompt)] == [1, 2, 3, 0]


class Unmapped(TensorRows):
    def copy_to(self, main_TD: torch.Tensor, deepstack_NTD: torch.Tensor | None, first_row: int) -> None:
        raise RuntimeError("unmapped")


@torch.inference_mode()
def test_embeddings_that_cannot_be_read_are_reported_and_the_others_land(decoder: TextDecoder, cache: KvCache) -> None:
    good, bad, short = (sequence(decoder, cache) for _ in range(3))
    bad.media.received[0] = Unmapped(torch.zeros(5, 384))
    short.media.received[0] = TensorRows(torch.zeros(1, 384))
    buffer = input_buffer(decoder, 64)
    prepared = buffer.write([Chunk(each, 0, NUM_TOKENS, samples=False) for each in (bad, good, short)])
    assert [chunk.request for chunk in prepared.failed] == [bad, short]
    assert str(next(iter(prepared.failed.values()))) == "unmapped"
    embeds, deepstack = expected(decoder, good)
    inputs = prepared.inputs
    share = slice(NUM_TOKENS, 2 * NUM_TOKENS)
    assert torch.equal(inputs.embeds_TC[share], embeds)
    assert inputs.deepstack_NTC is not None and torch.equal(inputs.deepstack_NTC[:, share], deepstack)
