"""Answers to random schemas, chosen from random logits through the engine's own masks, are valid."""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import torch

from tests.llm_worker.engine.random_schemas import random_schema
from tests.llm_worker.engine.test_grammars_in_answers import Model
from vitrine_vlm.llm_worker.engine.grammar import JsonGrammar
from vitrine_vlm.llm_worker.engine.grammar_masks import GrammarMasks
from vitrine_vlm.llm_worker.engine.grammar_matcher import GrammarMatcher
from vitrine_vlm.llm_worker.engine.request import SamplingParams

NUM_SCHEMAS = 1000
MAX_TOKENS = 400
_BATCH = 100


@dataclass
class Answer:
    schema: dict[str, Any]
    matcher: GrammarMatcher
    token_ids: list[int] = field(default_factory=list)
    is_finished: bool = False


@pytest.fixture(scope="module", params=["bytes", "shipped"])
def model(request: pytest.FixtureRequest, qwen3_vl_folder: Path) -> Model:
    """A vocabulary of bytes, and one with merges."""
    shipped = Path(__file__).parents[3] / "sample_models" / "tiny_vlm" / "vitrine-tiny-vlm"
    model = Model(qwen3_vl_folder if request.param == "bytes" else shipped)
    request.addfinalizer(model.grammars.close)
    return model


async def test_every_answer_that_ends_is_valid(model: Model) -> None:
    random_ = random.Random(18)
    num_finished = 0
    masks = GrammarMasks(model.vocab_size, torch.device("cpu"))
    generator = torch.Generator().manual_seed(18)
    for _ in range(NUM_SCHEMAS // _BATCH):
        schemas = [random_schema(random_) for _ in range(_BATCH)]
        for schema in schemas:
            jsonschema.Draft202012Validator.check_schema(schema)
        grammars = [JsonGrammar(json.dumps(schema)) for schema in schemas]
        # Half at a time, as the compiler has a limit.
        matchers = [each for half in (grammars[::2], grammars[1::2]) for each in await _matchers(model, half)]
        answers = [Answer(*each) for each in zip(schemas[::2] + schemas[1::2], matchers, strict=True)]
        _generate(model, masks, answers, generator)
        for answer in answers:
            if answer.is_finished:
                num_finished += 1
                text = model.tokenizer.decode(answer.token_ids, skip_special_tokens=True)
                _validate(json.loads(text), answer.schema)
    assert num_finished > 0.95 * NUM_SCHEMAS


def _validate(value: Any, schema: dict[str, Any]) -> None:
    validator = jsonschema.Draft202012Validator
    validator(schema, format_checker=validator.FORMAT_CHECKER).validate(value)


async def _matchers(model: Model, grammars: list[JsonGrammar]) -> list[GrammarMatcher]:
    return await asyncio.gather(*map(model.grammars.matcher, grammars))


def _generate(model: Model, masks: GrammarMasks, answers: list[Answer], generator: torch.Generator) -> None:
    params = SamplingParams(stop_token_ids=model.eos_token_ids)
    # What ends a value is likely: random text would go on for long, and end by its length.
    bias_V = torch.zeros(model.vocab_size)
    for token_id in range(model.vocab_size):
        text = model.tokenizer.text_of(token_id)
        bias_V[token_id] = 4.0 if text.strip(" ") in ('"', "}", "]", ",") else -6.0 if text.isspace() else 0.0
    bias_V[list(model.eos_token_ids)] = 6.0
    for _ in range(MAX_TOKENS):
        open_ = [each for each in answers if not each.is_finished]
        if not open_:
            return
        logits_KV = bias_V + torch.randn((len(open_), model.vocab_size), generator=generator)
        chosen = masks.apply([each.matcher for each in open_], [params] * len(open_), logits_KV, logits_KV).argmax(-1)
        for answer, token_id in zip(open_, chosen.tolist(), strict=True):
            answer.token_ids.append(token_id)
            answer.is_finished = token_id in model.eos_token_ids or answer.matcher.accept(token_id)
