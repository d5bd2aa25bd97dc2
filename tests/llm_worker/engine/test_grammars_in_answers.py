"""Answers of the real engine, with a small random checkpoint, that a grammar constrains."""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from pathlib import Path

import jsonschema
import pytest

from tests.llm_worker.engine.harness import Request, collect, greedy, is_idle, running_engine, submit, unsent, until
from tests.llm_worker.engine.test_following_steps import Followed
from vitrine_vlm.llm_worker.engine.engine import Engine
from vitrine_vlm.llm_worker.engine.grammar import (
    ChoiceGrammar,
    EbnfGrammar,
    Grammar,
    JsonGrammar,
    RegexGrammar,
    ToolGrammar,
)
from vitrine_vlm.llm_worker.engine.grammar_compiler import GrammarCompiler
from vitrine_vlm.llm_worker.engine.request import SamplingParams, TokenOutput
from vitrine_vlm.llm_worker.engine.request_handle import RequestHandle
from vitrine_vlm.llm_worker.engine.runner import MakeRunner, PlainRunner
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

SCHEMA = {
    "type": "object",
    "properties": {"colour": {"enum": ["red", "green"]}, "count": {"type": "integer", "minimum": 0, "maximum": 99}},
    "required": ["colour", "count"],
    "additionalProperties": False,
}
OBJECT = JsonGrammar(json.dumps(SCHEMA))
CALL = ToolGrammar((("paint", json.dumps(SCHEMA)),), at_least_one=True, parallel=False)


class Model:
    """A tokenizer with its grammars and end tokens."""

    def __init__(self, folder: Path) -> None:
        checkpoint = open_checkpoint(str(folder))
        self.tokenizer = PromptTokenizer(checkpoint)
        self.eos_token_ids = SamplingDefaults.from_checkpoint(checkpoint).eos_token_ids
        self.vocab_size: int = (checkpoint.config.get("text_config") or checkpoint.config)["vocab_size"]
        self.grammars = GrammarCompiler(self.tokenizer.for_grammars(self.vocab_size, self.eos_token_ids))

    def text(self, outputs: list[TokenOutput]) -> str:
        return self.tokenizer.decode([each.token_id for each in outputs], skip_special_tokens=True)

    def sampling(self, grammar: Grammar | None, max_tokens: int = 200, seed: int = 0) -> SamplingParams:
        return SamplingParams(
            max_tokens=max_tokens, temperature=1.0, seed=seed, stop_token_ids=self.eos_token_ids, grammar=grammar
        )

    async def submit(self, engine: Engine, request: Request, sampling: SamplingParams) -> RequestHandle:
        if sampling.grammar is None:
            return submit(engine, request, sampling)
        matcher = await self.grammars.matcher(sampling.grammar)
        handle = engine.submit("request", request.prefix, sampling, unsent, matcher=matcher)
        handle.set_prompt(request.prompt)
        return handle


@pytest.fixture(scope="module")
def model(qwen3_vl_folder: Path) -> Iterator[Model]:
    model = Model(qwen3_vl_folder)
    yield model
    model.grammars.close()


@pytest.fixture(params=[PlainRunner, Followed], ids=["one by one", "overlapped"])
async def engine(qwen3_vl_folder: Path, request: pytest.FixtureRequest) -> AsyncIterator[Engine]:
    make_runner: MakeRunner = request.param
    with running_engine(qwen3_vl_folder, make_runner) as engine:
        yield engine
        await until(lambda: is_idle(engine))


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize(
    ("grammar", "pattern"),
    [
        (RegexGrammar("[a-f]{3,5}-[0-9]{2}"), r"[a-f]{3,5}-\d\d"),
        (ChoiceGrammar(("yes", "no", 'a.b*\n"c" <d>')), 'yes|no|a\\.b\\*\n"c" <d>'),
        (EbnfGrammar('root ::= "<" [a-c]+ ">" | "[" [0-9] "]"'), r"<[a-c]+>|\[\d\]"),
        (EbnfGrammar('start: "x" /[0-9]/ "y"'), r"x\dy"),
        (CALL, r'<tool_call>\n\{"name": "paint", "arguments": \{[^{}]*\}\}\n</tool_call>'),
    ],
)
async def test_an_answer_has_the_form_of_its_grammar(
    engine: Engine, model: Model, text: Request, grammar: Grammar, pattern: str, temperature: float
) -> None:
    sampling = [replace(model.sampling(grammar, seed=seed), temperature=temperature) for seed in range(4)]
    handles = [await model.submit(engine, text, each) for each in sampling]
    answers = await asyncio.gather(*map(collect, handles))
    for outputs in answers:
        if outputs[-1].finish_reason == "stop":
            assert re.fullmatch(pattern, model.text(outputs))
        else:
            assert len(outputs) == 200  # "length": as `[a-c]+` may go on for ever
    assert temperature == 0 or any(each[-1].finish_reason == "stop" for each in answers)


async def test_json_is_valid_and_free_answers_beside_it_stay_the_same(
    engine: Engine, model: Model, text: Request
) -> None:
    free = [replace(model.sampling(None, 24, seed), logprobs=2) for seed in range(3)] + [greedy(24)]
    alone = [await collect(submit(engine, text, each)) for each in free]
    constrained = [model.sampling(OBJECT, seed=seed) for seed in range(8)]
    handles = [await model.submit(engine, text, each) for each in (*free, *constrained)]
    outputs = await asyncio.gather(*map(collect, handles))
    ids = [[[output.token_id for output in one] for one in answers] for answers in (outputs[:4], alone)]
    assert ids[0] == ids[1]
    answers = [json.loads(model.text(each)) for each in outputs[4:] if each[-1].finish_reason == "stop"]
    assert len(answers) >= 6
    for answer in answers:
        jsonschema.validate(answer, SCHEMA)
    assert len({json.dumps(each) for each in answers}) > 1


async def test_an_answer_is_the_same_alone_and_beside_others(engine: Engine, model: Model, text: Request) -> None:
    params = [model.sampling(OBJECT, seed=seed) for seed in range(5)]
    alone = [await collect(await model.submit(engine, text, each)) for each in params]
    handles = [await model.submit(engine, text, each) for each in params]
    assert await asyncio.gather(*map(collect, handles)) == alone


@pytest.mark.parametrize("stop_token_ids", [frozenset(), frozenset([5])])
async def test_an_answer_ends_where_nothing_can_follow_also_without_end_tokens(
    engine: Engine, model: Model, text: Request, stop_token_ids: frozenset[int]
) -> None:
    sampling = replace(model.sampling(ChoiceGrammar(("seventeen",))), stop_token_ids=stop_token_ids, min_tokens=100)
    outputs = await collect(await model.submit(engine, text, sampling))
    assert (model.text(outputs), outputs[-1].finish_reason) == ("seventeen", "stop")


@pytest.mark.parametrize("grammar", [RegexGrammar(""), ChoiceGrammar(("",))])
async def test_an_answer_that_has_to_be_empty_ends_also_without_end_tokens(
    engine: Engine, model: Model, text: Request, grammar: Grammar
) -> None:
    (eos, *_) = model.eos_token_ids
    for sampling in (model.sampling(grammar), replace(model.sampling(grammar), stop_token_ids=frozenset())):
        [output] = await collect(await model.submit(engine, text, sampling))
        assert (output.token_id, output.finish_reason) == (eos, "stop")


async def test_an_answer_that_may_go_on_ends_by_an_end_token_or_its_length(
    engine: Engine, model: Model, text: Request
) -> None:
    (eos, *_) = model.eos_token_ids
    wanted = replace(model.sampling(RegexGrammar("a+"), 8), temperature=0.0)
    to_end = replace(wanted, logit_bias={eos: 100.0})
    outputs = await collect(await model.submit(engine, text, to_end))
    assert [each.finish_reason for each in outputs][-1] == "stop"
    assert re.fullmatch("a+", model.text(outputs))
    assert outputs[-1].token_id == eos
    for ignored in (replace(to_end, stop_token_ids=frozenset()), replace(to_end, min_tokens=8)):
        outputs = await collect(await model.submit(engine, text, ignored))
        assert (len(outputs), outputs[-1].finish_reason) == (8, "length")
        assert re.fullmatch("a+", model.text(outputs))


async def test_a_grammar_is_stronger_than_other_exclusions(engine: Engine, model: Model, text: Request) -> None:
    grammar = ChoiceGrammar(("abc",))
    (a,) = model.tokenizer.encode("a")
    excluding = replace(model.sampling(grammar), bad_words=tuple((each,) for each in range(200)))
    only = replace(model.sampling(grammar), allowed_token_ids=frozenset([a + 1]))
    for sampling in (excluding, only):
        outputs = await collect(await model.submit(engine, text, sampling))
        assert (model.text(outputs), outputs[-1].finish_reason) == ("abc", "stop")


async def test_preempted_answers_go_on_where_they_were(qwen3_vl_folder: Path, model: Model, text: Request) -> None:
    params = [model.sampling(OBJECT, seed=seed) for seed in range(6)]
    with running_engine(qwen3_vl_folder, Followed) as engine:
        expected = [await collect(await model.submit(engine, text, each)) for each in params]
    with running_engine(qwen3_vl_folder, Followed, num_blocks=16) as engine:
        handles = [await model.submit(engine, text, each) for each in params]
        assert await asyncio.gather(*map(collect, handles)) == expected
        assert engine.stats().num_preempted


async def test_cancelled_answers_leave_nothing(engine: Engine, model: Model, text: Request) -> None:
    for seed in range(10):
        biased = replace(model.sampling(RegexGrammar("[a-z]*")), logit_bias={1: 1.0}, presence_penalty=1.0, seed=seed)
        handle = await model.submit(engine, text, biased)
        async for _ in handle:
            handle.cancel()
            break
    await until(lambda: is_idle(engine))
    processor = engine._requests._logits_processor
    assert (len(processor._bias), len(processor._counts), processor._counted) == (0, 0, {})


async def test_log_probabilities_are_the_models_own(engine: Engine, model: Model, text: Request) -> None:
    free = await collect(submit(engine, text, greedy(1, logprobs=3)))
    sampling = replace(model.sampling(OBJECT), logprobs=3)
    outputs = await collect(await model.submit(engine, text, sampling))
    assert free[0].logprobs is not None and outputs[0].logprobs is not None
    for constrained, own in zip(outputs[0].logprobs.top, free[0].logprobs.top, strict=True):
        assert constrained[0] == own[0] and abs(constrained[1] - own[1]) < 1e-4
    assert outputs[0].token_id != free[0].token_id
