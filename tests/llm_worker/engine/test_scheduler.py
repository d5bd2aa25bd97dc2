"""The chunks of a step, and the requests that have to wait for memory."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.tensor_rows import TensorRows
from vitrine_vlm.errors import PromptTooLong
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.kv_cache import KvCache
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt, MediaSpan, SamplingParams
from vitrine_vlm.llm_worker.engine.request_parts import RemoteKv, SampledTokens
from vitrine_vlm.llm_worker.engine.request_state import RequestState
from vitrine_vlm.llm_worker.engine.scheduler import Scheduler
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.llm_worker.families import text_config
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

BLOCK_SIZE = 4


class Bench:
    """A scheduler and its cache, and requests that come in order."""

    def __init__(
        self,
        folder: Path,
        num_blocks: int = 64,
        budget: int = 16,
        max_num_seqs: int = 8,
        prefix_cache: bool = False,
        mixed_step_tokens: int | None = None,
    ) -> None:
        config = text_config(open_checkpoint(str(folder)))
        self.cache = KvCache(config, num_blocks, BLOCK_SIZE, torch.device("cpu"), torch.float32)
        goals = StepGoals(StepCosts.unknown(), 0.03, 0.5, mixed_step_tokens or budget)
        self.scheduler = Scheduler(self.cache, budget, max_num_seqs, 200, goals, prefix_cache)
        self.num_sequences = 0

    def add(self, num_prefix: int, remote_kv: RemoteKv | None = None) -> RequestState:
        index = self.num_sequences
        self.num_sequences += 1
        sampled = SampledTokens(SamplingParams(max_tokens=4))
        request = RequestState(index, str(index), list(range(num_prefix)), sampled, remote_kv)
        self.scheduler.add(request)
        return request

    def remove(self, request: RequestState) -> None:
        """Removes a request that has ended."""
        self.scheduler.remove(request)
        self.cache.release(request.table)
        request.finish()

    def prompt(self, sequence: RequestState, num_tokens: int, *spans: MediaSpan) -> None:
        positions = torch.arange(num_tokens).expand(3, -1)
        sequence.set_prompt(ExpandedPrompt(list(range(num_tokens)), positions, num_tokens, spans))
        self.scheduler.limit_length(sequence)

    def add_whole(self, num_tokens: int, *spans: MediaSpan) -> RequestState:
        sequence = self.add(min((span.start for span in spans), default=num_tokens))
        self.prompt(sequence, num_tokens, *spans)
        return sequence

    def step(self) -> list[Chunk]:
        """Schedules a step, and changes the requests as computing it does."""
        chunks = self.scheduler.schedule()
        for chunk in chunks:
            chunk.request.launch(chunk.stop, chunk.samples)
            self.scheduler.commit(chunk)
            if chunk.samples:
                chunk.request.token_arrived()
                chunk.request.append_token(0)
        return chunks


def missing_items(request: RequestState) -> list[int]:
    return request.media.request_missing(request.prompt, request.num_computed)


def plain(chunks: list[Chunk]) -> list[tuple[str, int, int, bool]]:
    return [(chunk.request.request_id, chunk.start, chunk.stop, chunk.samples) for chunk in chunks]


@pytest.fixture
def folder(qwen3_vl_folder: Path) -> Path:
    return qwen3_vl_folder


def test_a_long_prompt_does_not_make_decoding_wait(folder: Path) -> None:
    bench = Bench(folder, budget=32, mixed_step_tokens=8)
    for num_tokens in (3, 4):
        bench.add_whole(num_tokens)
    bench.step()
    bench.add_whole(40)
    assert plain(bench.step()) == [("0", 3, 4, True), ("1", 4, 5, True), ("2", 0, 6, False)]
    assert plain(bench.step())[2:] == [("2", 6, 12, False)]
    # However many decode, prompts get at least a quarter of it.
    bench = Bench(folder, budget=32, mixed_step_tokens=8)
    for _ in range(7):
        bench.add_whole(2)
    bench.step()
    bench.add_whole(40)
    assert plain(bench.step())[-1] == ("7", 0, 2, False)
    # Alone, it has the whole step.
    bench = Bench(folder, budget=32, mixed_step_tokens=8)
    bench.add_whole(40)
    assert plain(bench.step()) == [("0", 0, 32, False)]


def test_decoding_comes_first_and_prefill_takes_what_is_left(folder: Path) -> None:
    bench = Bench(folder)
    bench.add_whole(10)
    assert plain(bench.step()) == [("0", 0, 10, True)]
    bench.add_whole(20)
    bench.add_whole(20)
    assert plain(bench.step()) == [("0", 10, 11, True), ("1", 0, 15, False)]
    assert plain(bench.step()) == [("0", 11, 12, True), ("1", 15, 20, True), ("2", 0, 10, False)]


def test_a_step_holds_no_more_sequences_than_it_may(folder: Path) -> None:
    bench = Bench(folder, max_num_seqs=2)
    for _ in range(3):
        bench.add_whole(3)
    assert [chunk.request.request_id for chunk in bench.step()] == ["0", "1"]


def test_prefill_goes_as_far_as_the_embeddings_have_come(folder: Path) -> None:
    bench = Bench(folder, budget=100)
    sequence = bench.add_whole(20, MediaSpan(0, 4, 3, 0), MediaSpan(1, 10, 3, 0), MediaSpan(0, 15, 2, 3))
    rows = TensorRows(torch.zeros(5, 1))
    assert plain(bench.step()) == [("0", 0, 4, False)]
    assert bench.step() == []
    sequence.receive_embeddings(0, rows)
    assert plain(bench.step()) == [("0", 4, 10, False)]
    assert not rows.num_releases  # its second span is still to come
    sequence.receive_embeddings(1, TensorRows(torch.zeros(3, 1)))
    assert plain(bench.step()) == [("0", 10, 20, True)]
    assert (rows.num_releases, sequence.media.received) == (1, {})


def test_blocks_are_allocated_by_arrival(folder: Path) -> None:
    bench = Bench(folder, num_blocks=8)
    first, large, small = bench.add_whole(16), bench.add_whole(20), bench.add_whole(4)
    assert [chunk.request for chunk in bench.step()] == [first]
    # The small one would fit, but would let the large one wait for ever.
    assert bench.scheduler.waiting == [large, small]
    bench.remove(first)
    assert [chunk.request for chunk in bench.step()] == [large]
    bench.remove(large)
    assert [chunk.request for chunk in bench.step()] == [small]
    bench.remove(small)
    assert bench.cache.num_free == 8


def test_the_request_that_came_last_is_preempted_for_earlier_ones(folder: Path) -> None:
    bench = Bench(folder, num_blocks=8)
    one, other = bench.add(9), bench.add(9)
    assert plain(bench.step()) == [("0", 0, 8, False), ("1", 0, 8, False)]
    bench.prompt(one, 20)
    bench.prompt(other, 20)
    # Each holds 3 blocks and needs 5 of 8: neither could go on beside the other.
    assert plain(bench.step()) == [("0", 8, 20, True)]
    assert (bench.scheduler.waiting, other.num_computed, other.table.blocks) == ([other], 0, [])
    assert bench.scheduler.num_preempted == 1
    # The preempted request is next: later ones are not admitted before it.
    latest = bench.add(4)
    assert plain(bench.step()) == [("0", 20, 21, True)]
    bench.remove(one)
    assert plain(bench.step()) == [("1", 0, 16, False)]
    assert latest in bench.scheduler.running


def test_a_long_answer_is_allocated_blocks_as_it_grows_and_preempted_requests_are_computed_again(folder: Path) -> None:
    bench = Bench(folder, num_blocks=5, budget=100)
    first, second = bench.add_whole(7), bench.add_whole(7)
    first.max_total_tokens = second.max_total_tokens = 20
    assert plain(bench.step()) == [("0", 0, 7, True), ("1", 0, 7, True)]
    assert plain(bench.step()) == [("0", 7, 8, True), ("1", 7, 8, True)]
    # Both need a third block, and there is one.
    assert plain(bench.step()) == [("0", 8, 9, True)]
    assert second.num_computed == 0
    while len(first.token_ids) < 20:
        assert [chunk.request for chunk in bench.step()] == [first]
    bench.remove(first)
    # Its prompt and what it had generated run as one chunk across both.
    assert plain(bench.step()) == [("1", 0, 9, True)]
    assert second.positions(0, 9).tolist() == [list(range(9))] * 3


def test_an_answer_that_is_computed_again_does_not_make_decoding_wait(folder: Path) -> None:
    bench = Bench(folder, budget=32, mixed_step_tokens=8)
    first, second = bench.add_whole(4), bench.add_whole(4)
    bench.step()
    # As after its preemption, once its prompt is computed again.
    first.token_ids += [0] * 40
    first.max_total_tokens = 60
    assert plain(bench.step()) == [("1", 4, 5, True), ("0", 4, 11, False)]
    bench.remove(second)
    assert plain(bench.step()) == [("0", 11, 43, False)]


def test_equal_beginnings_are_computed_once(folder: Path) -> None:
    bench = Bench(folder, budget=100, prefix_cache=True)
    span = MediaSpan(0, 6, 8, 0)

    def add(num_tokens: int, content: bytes) -> RequestState:
        sequence = bench.add(6)
        positions = torch.arange(num_tokens).expand(3, -1)
        prompt = ExpandedPrompt(list(range(num_tokens)), positions, num_tokens, (span,), (content,))
        sequence.set_prompt(prompt)
        bench.scheduler.limit_length(sequence)
        sequence.receive_embeddings(0, TensorRows(torch.zeros(8, 1)))
        return sequence

    one = add(21, b"cat")
    assert plain(bench.step()) == [("0", 0, 21, True)]
    two = add(30, b"cat")
    assert plain(bench.step()) == [("0", 21, 22, True), ("1", 20, 30, True)]
    assert two.table.blocks[:5] == one.table.blocks[:5] and two.table.blocks[5] not in one.table.blocks
    assert (two.prefix.num_tokens, two.media.received, bench.scheduler.num_cached_tokens) == (20, {}, 20)
    # A prompt with another picture shares the first block, which ends before it; so does one without a hash.
    for index, content in enumerate((b"dog", b""), 2):
        add(21, content)
        assert plain(bench.step())[-1] == (str(index), 4, 21, True)
    # The last token is computed, even if the KV of the whole prompt is cached.
    add(20, b"cat")
    assert plain(bench.step())[-1] == ("4", 16, 20, True)
    # Kept after its end, too.
    for sequence in list(bench.scheduler.running):
        bench.remove(sequence)
    assert bench.cache.num_free == bench.cache.num_blocks
    add(21, b"cat")
    assert plain(bench.step()) == [("5", 20, 21, True)]


def test_a_cached_picture_is_not_computed_although_its_early_text_was(folder: Path) -> None:
    bench = Bench(folder, budget=100, prefix_cache=True)
    span, positions = MediaSpan(0, 6, 8, 0), torch.arange(21).expand(3, -1)
    prompt = ExpandedPrompt(list(range(21)), positions, 21, (span,), (b"cat",))
    for index in range(2):
        sequence = bench.add(6)
        assert plain(bench.step()) == [(str(index), 4 * index, 5, False)]
        sequence.set_prompt(prompt)
        bench.scheduler.limit_length(sequence)
        sequence.receive_embeddings(0, TensorRows(torch.zeros(8, 1)))
        assert plain(bench.step()) == [(str(index), (5, 20)[index], 21, True)]
        assert sequence.prefix.num_tokens == (0, 20)[index]
        bench.remove(sequence)


def test_embeddings_are_requested_where_they_were_not_announced_and_where_they_are_lost(folder: Path) -> None:
    bench = Bench(folder, num_blocks=8, budget=100, prefix_cache=True)
    earlier = bench.add_whole(12)
    sequence = bench.add(4)
    bench.prompt(sequence, 16, MediaSpan(0, 4, 4, 0), MediaSpan(1, 10, 2, 0))
    sequence.media.requested_items = {0}
    bench.step()
    assert missing_items(sequence) == [1]
    assert missing_items(sequence) == []
    for item in (0, 1):
        sequence.receive_embeddings(item, TensorRows(torch.zeros(4, 1)))
    assert plain(bench.step())[-1] == ("1", 4, 16, True)
    earlier.max_total_tokens = 30
    while sequence in bench.scheduler.running:
        bench.step()
    assert bench.scheduler.waiting == [sequence]
    bench.remove(earlier)
    # Its first block is still cached, and the hash of the media behind it is unknown.
    assert plain(bench.step()) == []
    assert (sequence.num_computed, missing_items(sequence)) == (4, [0, 1])


def test_early_text_that_has_no_room_does_not_block_later_requests(folder: Path) -> None:
    bench = Bench(folder, num_blocks=4)
    early = bench.add(40)
    ready = bench.add_whole(8)
    assert [chunk.request for chunk in bench.step()] == [ready]
    assert bench.scheduler.waiting == [early]


def test_a_prompt_that_is_computed_elsewhere_blocks_later_requests(folder: Path) -> None:
    """The prompt becomes known only after its admission: others could be admitted before it for ever."""
    bench = Bench(folder, num_blocks=5)
    running = bench.add_whole(8)
    bench.step()
    elsewhere = bench.add(8, RemoteKv())
    small = bench.add_whole(2)
    assert [chunk.request for chunk in bench.step()] == [running]
    assert bench.scheduler.waiting == [elsewhere, small]
    bench.remove(running)
    bench.step()
    assert bench.scheduler.running == [elsewhere, small]


def test_longest_answer(folder: Path) -> None:
    bench = Bench(folder)
    assert bench.add_whole(10).max_total_tokens == 14
    assert bench.add_whole(198).max_total_tokens == 200
    with pytest.raises(PromptTooLong, match="limit of 200 tokens, the answer included: the prompt has 200"):
        bench.add_whole(200)
    with pytest.raises(PromptTooLong, match="limit of 16 tokens"):
        Bench(folder, num_blocks=4).add_whole(16)


def test_answers_whose_last_tokens_are_in_flight_need_no_more_memory(folder: Path) -> None:
    """Their prompts and all but the last of their four tokens fill two blocks each; a fifth is for one of them."""
    bench = Bench(folder, num_blocks=5)
    sequences = [bench.add_whole(5) for _ in range(2)]
    for _ in range(4):
        assert len(bench.step()) == 2
    assert [len(each.token_ids) for each in sequences] == [9, 9] and bench.step() == []
    assert bench.scheduler.num_preempted == 0 and bench.scheduler.running == sequences
