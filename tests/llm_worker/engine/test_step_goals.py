"""How many prompt tokens a step takes beside decoding: by single decisions, and by traces through the scheduler."""

from __future__ import annotations

import random
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import pytest
import torch

from tests.llm_worker.engine.harness import request_state
from tests.llm_worker.engine.simulated_steps import Load, Outcome, Simulation
from vitrine_vlm.llm_worker.engine.chunk import Chunk
from vitrine_vlm.llm_worker.engine.config import EngineConfig
from vitrine_vlm.llm_worker.engine.cost_probes import measure_step_costs
from vitrine_vlm.llm_worker.engine.forward_pass import ForwardPass, StepOutput
from vitrine_vlm.llm_worker.engine.request import ExpandedPrompt
from vitrine_vlm.llm_worker.engine.request_state import RequestState, RequestStatus
from vitrine_vlm.llm_worker.engine.step_costs import StepCosts, StepSize, causal_pairs
from vitrine_vlm.llm_worker.engine.step_goals import StepGoals
from vitrine_vlm.llm_worker.families import build_decoder, text_config
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.model_loading.checkpoint import open_checkpoint
from vitrine_vlm.simulation.costs import MEASURED

# Pictures of Qwen3-VL: 560x560, 720p and 1080p, and seconds of its tower on one H200.
SMALL, LARGE, LARGEST = (324, 2.6e-3), (920, 9.3e-3), (2040, 31e-3)


def with_pictures(in_flight: int, picture: tuple[int, float], pictures: int = 1, num_generated: int = 64) -> Load:
    return Load(in_flight, 40, num_generated, pictures, *picture)


STREAMS = [Load(16, 40, 256), with_pictures(8, LARGEST, num_generated=1)]
LOADS = {
    "32 x 560x560": [with_pictures(32, SMALL)],
    "32 x 720p": [with_pictures(32, LARGE)],
    "8 x 1080p": [with_pictures(8, LARGEST)],
    "32 x 1080p": [with_pictures(32, LARGEST)],
    "64 x 1080p": [with_pictures(64, LARGEST)],
    "16 of 4 x 560x560": [with_pictures(16, SMALL, pictures=4)],
    "streams beside 1080p": STREAMS,
    "text": [Load(32, 512, 128)],
}


@pytest.fixture(scope="module")
def config(qwen3_vl_folder: Path) -> TextConfig:
    return text_config(open_checkpoint(str(qwen3_vl_folder)))


def quantile(values: Sequence[float], part: float) -> float:
    return sorted(values)[int(part * len(values))]


def gaps(outcomes: Sequence[Outcome]) -> list[float]:
    return [gap for outcome in outcomes for gap in outcome.gaps]


def scaled_costs(factor: float) -> StepCosts:
    """Costs whose seconds are all `factor` times those measured."""
    costs = MEASURED.step_costs()
    decode_s, mixed_s = ({size: factor * s for size, s in each.items()} for each in (costs.decode_s, costs.mixed_s))
    return StepCosts(decode_s, mixed_s, factor * costs.per_key_s, factor * costs.per_pair_s)


def trace(config: TextConfig, loads: list[Load], **options: object) -> Simulation:
    simulation = Simulation(config, loads, **options)  # type: ignore[arg-type]
    simulation.run(12)
    return simulation


def fixed(config: TextConfig, loads: list[Load], max_mixed_tokens: int) -> Simulation:
    """Steps of a constant size, as without goals."""
    return trace(config, loads, costs=StepCosts.unknown(), max_mixed_tokens=max_mixed_tokens)


def rate(simulation: Simulation, load: Load) -> float:
    """Tokens a second."""
    times = (time for outcome in simulation.outcomes if outcome.load is load for time in outcome.token_times)
    return sum(time > 3 for time in times) / 9


@pytest.mark.parametrize("name", LOADS)
def test_goals_are_kept_at_every_load(config: TextConfig, name: str) -> None:
    loads = LOADS[name]
    simulation = trace(config, loads)
    for load in loads:
        finished = simulation.begun(load, after_s=3)
        assert len(finished) >= 9
        if load.num_generated > 1:
            # Longer than the goal where the encoder takes its half of the GPU in bursts. Planned without the
            # correction, 64 x 1080p would have 57 ms here, and 51 in the median.
            assert quantile(gaps(finished), 0.99) <= 0.045
    assert simulation.goals.num_itl_missed == 0
    # Prompts begin in order of arrival: none is passed over.
    first_tokens = [each.token_times[0] for each in simulation.outcomes if each.load is loads[-1] and each.token_times]
    assert sum(later < earlier for earlier, later in pairwise(first_tokens)) == 0


def test_heavy_load_has_the_throughput_of_long_steps(config: TextConfig) -> None:
    for name, least in (("32 x 1080p", 0.97), ("8 x 1080p", 0.93), ("32 x 720p", 0.88), ("32 x 560x560", 1.0)):
        (load,) = loads = LOADS[name]
        assert rate(trace(config, loads), load) >= least * rate(fixed(config, loads, 512), load), name
    (load,) = loads = LOADS["32 x 1080p"]
    assert rate(trace(config, loads), load) >= 1.35 * rate(fixed(config, loads, 128), load)


def test_streams_are_not_slowed_for_pictures_that_wait_for_the_encoder(config: TextConfig) -> None:
    text, pictures = STREAMS
    simulation, gentle, long = trace(config, STREAMS), fixed(config, STREAMS, 128), fixed(config, STREAMS, 512)
    assert rate(simulation, text) >= 0.7 * rate(gentle, text) >= 1.5 * rate(long, text)
    assert rate(simulation, pictures) >= 1.0 * rate(gentle, pictures)
    assert quantile(gaps(simulation.begun(text, after_s=3)), 0.5) <= 0.012


def test_light_load_is_gentle(config: TextConfig) -> None:
    loads = [Load(4, 40, 256), with_pictures(1, LARGEST, num_generated=1)]
    simulation = trace(config, loads)
    text, pictures = (simulation.begun(load, after_s=3) for load in loads)
    assert quantile(gaps(text), 0.5) <= 0.0075
    assert quantile([each.ttft_s for each in pictures], 0.99) < 0.5
    assert simulation.goals.num_ttft_missed == 0


@pytest.mark.parametrize("factor", [0.3, 3.0])
def test_steps_correct_wrong_costs(config: TextConfig, factor: float) -> None:
    (load,) = loads = [Load(32, 2000, 64)]
    simulation = trace(config, loads, costs=scaled_costs(factor))
    assert simulation.costs.correction == pytest.approx(1 / factor, rel=0.1)
    assert quantile(gaps(simulation.begun(load, after_s=3)), 0.99) <= 0.033


@pytest.mark.parametrize("seed", range(12))
def test_every_request_proceeds_in_random_traces(config: TextConfig, seed: int) -> None:
    generator = random.Random(seed)
    loads = [
        Load(
            generator.randint(1, 12),
            generator.randint(1, 3000),
            generator.choice([1, 16, 64, 256]),
            pictures := generator.choice([0, 0, 1, 3]),
            *(generator.choice([SMALL, LARGE, LARGEST]) if pictures else (0, 0.0)),
        )
        for _ in range(generator.randint(1, 4))
    ]
    goal_s = generator.choice([0.008, 0.03, 0.1])
    simulation = trace(config, loads, really=scaled_costs(generator.uniform(0.5, 2)), target_itl_s=goal_s)
    for outcome in simulation.outcomes:
        if not outcome.token_times:
            assert simulation.now - outcome.submitted_at < 8, (seed, outcome.load)
        # No answer stops for long in its midst, unless its KV blocks were lost.
        if not simulation.scheduler.num_preempted:
            assert max(outcome.gaps, default=0) <= max(0.2, 5 * goal_s), (seed, outcome.load)


def test_preempted_requests_come_back(config: TextConfig) -> None:
    loads = [Load(24, 200, 256)]
    simulation = trace(config, loads, num_blocks=400)
    assert simulation.scheduler.num_preempted > 0
    assert sum(each.is_finished for each in simulation.outcomes) > 24


def ready(num_tokens: int, num_computed: int = 0, ready_at: float | None = None) -> RequestState:
    request = request_state(ExpandedPrompt([0] * num_tokens, torch.arange(num_tokens).expand(3, -1), num_tokens))
    request.num_computed = num_computed
    request.admit()
    request.timings.ready_at = ready_at
    assert request.status is RequestStatus.PREFILLING
    return request


def decoding(count: int, context: int = 500) -> list[RequestState]:
    return [ready(context, context - 1) for _ in range(count)]


def choose(goals: StepGoals, num_decoding: int, *prompts: RequestState, now: float = 0.0) -> int:
    return goals.num_prompt_tokens(decoding(num_decoding), prompts, now)


def seconds(num_decoding: int, num_prompt_tokens: int, start: int = 0) -> float:
    pairs = causal_pairs(start, start + num_prompt_tokens)
    return MEASURED.step_costs().seconds(StepSize(num_decoding, 499 * num_decoding, num_prompt_tokens, pairs))


def test_prompt_tokens_that_cost_little_are_always_taken() -> None:
    goals = StepGoals(MEASURED.step_costs(), 0.03, 0.5, 8192)
    taken = choose(goals, 16, ready(4000, ready_at=0.0))
    assert 64 <= taken <= 192
    assert seconds(16, taken) <= 1.25 * seconds(16, 0)
    assert choose(goals, 16, ready(40, ready_at=0.0)) == 40


def test_as_many_tokens_as_the_first_token_needs() -> None:
    goals = StepGoals(MEASURED.step_costs(), 0.03, 0.5, 8192)
    relaxed, urgent, late = (choose(goals, 1, ready(4000, ready_at=0.0), now=now) for now in (0.0, 0.1, 1.0))
    assert relaxed < urgent < late
    for taken, left_s in ((relaxed, 0.5), (urgent, 0.4)):
        assert taken / seconds(1, taken) >= 4000 / (0.3 * left_s)
    assert goals.num_ttft_missed == 1
    # The goal for the time between tokens is stronger, and no smaller number of the captured sizes was possible.
    assert seconds(1, late) <= 0.03 < seconds(1, round(1.13 * late))


def test_few_prompts_do_not_delay_many_streams() -> None:
    goals = StepGoals(MEASURED.step_costs(), 0.03, 0.5, 8192)
    late = [ready(4000, ready_at=-1.0) for _ in range(16)]
    few, some, many = (choose(goals, 16, *late[:count]) for count in (4, 12, 16))
    assert few < some < many
    assert seconds(16, few) <= 1.25 * seconds(16, 0)
    # Those that wait for media do not count.
    waiting = [ready(4000) for _ in range(16)]
    assert choose(goals, 16, *waiting) == few


def test_limits() -> None:
    late = ready(4000, ready_at=-1.0)
    assert choose(StepGoals(MEASURED.step_costs(), 0.03, 0.5, 128), 1, late) == 127
    # However many decode, and however short the goal, prompts proceed.
    assert choose(StepGoals(MEASURED.step_costs(), 0.03, 0.5, 128), 128, late) == 32
    impossible = StepGoals(MEASURED.step_costs(), 0.001, 0.5, 8192)
    assert choose(impossible, 16, late) >= 32
    assert impossible.num_itl_missed == 1
    assert choose(StepGoals(StepCosts.unknown(), 0.03, 0.5, 64), 16, late) == 48


def test_longer_contexts_leave_room_for_fewer_tokens() -> None:
    goals = StepGoals(MEASURED.step_costs(), 0.03, 0.5, 8192)
    near, far = (choose(goals, 1, ready(60000, start, ready_at=-1.0)) for start in (0, 50000))
    assert far < near


def test_costs_are_measured_at_start(qwen3_vl_folder: Path) -> None:
    decoder = build_decoder(open_checkpoint(str(qwen3_vl_folder)), torch.device("cpu"), torch.float32)
    config = EngineConfig(max_num_batched_tokens=1024, num_blocks=512, block_size=16, max_num_seqs=32)
    forward_pass = ForwardPass(decoder, config)
    costs = measure_step_costs(forward_pass, config)
    assert forward_pass.kv_cache.num_free == config.num_blocks
    assert set(costs.decode_s) == {1, 2, 4, 8, 16, 32} and min(costs.decode_s.values()) > 0
    assert costs.mixed_s[256] > costs.mixed_s[8]
    assert costs.seconds(StepSize(1, 1000)) >= costs.seconds(StepSize(1, 1))
    tiny = EngineConfig(max_num_batched_tokens=3, num_blocks=1, block_size=4, max_num_seqs=64)
    costs = measure_step_costs(ForwardPass(decoder, tiny), tiny)
    assert (set(costs.decode_s), set(costs.mixed_s)) == ({1}, {3})


def test_costs_are_those_of_a_quiet_device(qwen3_vl_folder: Path) -> None:
    decoder = build_decoder(open_checkpoint(str(qwen3_vl_folder)), torch.device("cpu"), torch.float32)
    config = EngineConfig(max_num_batched_tokens=64, num_blocks=16, block_size=16, max_num_seqs=4)
    durations = random.Random(0)

    class Disturbed(ForwardPass):
        """A forward pass that shares its device with another process until it has run 60 times: about five rounds."""

        num_left = 60

        def __call__(self, chunks: Sequence[Chunk]) -> StepOutput:
            self.num_left -= 1
            time.sleep(durations.uniform(0.01, 0.04) if self.num_left >= 0 else 0)
            return super().__call__(chunks)

    forward_pass = Disturbed(decoder, config)
    costs = measure_step_costs(forward_pass, config, patience_s=20.0)
    a_round = 4 + len(costs.decode_s) + len(costs.mixed_s)
    assert forward_pass.num_left <= -a_round
    for seconds in (costs.decode_s, costs.mixed_s):
        assert all(smaller <= larger for smaller, larger in pairwise(seconds.values()))


def test_more_tokens_cost_no_less_where_long_contexts_are_slow(qwen3_vl_folder: Path) -> None:
    decoder = build_decoder(open_checkpoint(str(qwen3_vl_folder)), torch.device("cpu"), torch.float32)
    config = EngineConfig(max_num_batched_tokens=64, num_blocks=16, block_size=16, max_num_seqs=4)

    class SlowBehindAContext(ForwardPass):
        """What is measured of a pair is too much for the chunks without a context in front."""

        def __call__(self, chunks: Sequence[Chunk]) -> StepOutput:
            time.sleep(0.03 if chunks[0].start > 0 else 0)
            return super().__call__(chunks)

    costs = measure_step_costs(SlowBehindAContext(decoder, config), config)
    assert costs.per_pair_s * causal_pairs(0, 64) > 0.004
    assert min(costs.mixed_s.values()) > 0
    assert all(smaller <= larger for smaller, larger in pairwise(costs.mixed_s.values()))
