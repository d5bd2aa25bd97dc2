"""Grammars are compiled once, within bounds, and what cannot be used says where."""

from __future__ import annotations

import asyncio
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.deploy.proc import children_of, is_running
from tests.llm_worker.engine.test_grammars_in_answers import Model
from vitrine_vlm.errors import Overloaded
from vitrine_vlm.llm_worker.engine.grammar import ChoiceGrammar, EbnfGrammar, Grammar, JsonGrammar, RegexGrammar
from vitrine_vlm.llm_worker.engine.grammar_checker import GrammarChecker
from vitrine_vlm.llm_worker.engine.grammar_compiler import MAX_CHARACTERS, GrammarCompiler
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError


@pytest.fixture(scope="module")
def model(qwen3_vl_folder: Path) -> Iterator[Model]:
    model = Model(qwen3_vl_folder)
    yield model
    model.grammars.close()


@pytest.fixture
def compiler(model: Model) -> Iterator[GrammarCompiler]:
    compiler = GrammarCompiler(model.grammars._tokenizer)
    yield compiler
    compiler.close()


def schema(**fields: Any) -> JsonGrammar:
    return JsonGrammar(json.dumps(fields))


@pytest.mark.parametrize(
    ("grammar", "message", "path"),
    [
        (JsonGrammar("{"), "no JSON", ()),
        (JsonGrammar("[" * 10_000), "no JSON", ()),
        (JsonGrammar('{"minimum": 1e999}'), "expected value", ()),
        (JsonGrammar('{"enum": ["\\ud800"]}'), "hex escape", ()),
        (JsonGrammar("[1]"), "of type list", ()),
        (JsonGrammar("false"), "of type bool", ()),
        (schema(anyOf=[{"type": "string"}, {"type": "object", "not": {}}]), "not", ("anyOf", "1")),
        (schema(properties={"a": {"items": {"pattern": "(?=b)"}}}), "look-around", ("properties", "a", "items")),
        (schema(prefixItems=[{}, {"format": "colour"}]), "colour", ("prefixItems", "1")),
        (schema(**{"$ref": "#/$defs/missing"}), "does not exist", ()),
        (schema(**{"$ref": "https://example.org/schema"}), "not present", ()),
        (schema(**{"$ref": "#"}), "no answer fits", ()),
        (schema(type="integer", minimum=2, maximum=1), "greater than", ()),
        (schema(properties={"id": {"enum": [1, 2**53 + 1]}}), "beyond 2", ("properties", "id", "enum")),
        (schema(prefixItems=[{"const": {"a": [-(2**60)]}}]), "beyond 2", ("prefixItems", "0", "const")),
        (schema(type="integer", minimum=2**53 + 1), "beyond 2", ("minimum",)),
        (schema(type="integer", exclusiveMaximum=2**60), "beyond 2", ("exclusiveMaximum",)),
        (RegexGrammar("a{2"), "regex", ()),
        (EbnfGrammar("root ::= ("), "cannot be read", ()),
        (EbnfGrammar("start: missing"), "missing", ()),
        (RegexGrammar("x" * (MAX_CHARACTERS + 1)), str(MAX_CHARACTERS), ()),
        (schema(type="integer", multipleOf=9999991), "more than 1 s", ()),
    ],
)
async def test_what_cannot_be_used(
    compiler: GrammarCompiler, grammar: Grammar, message: str, path: tuple[str, ...]
) -> None:
    with pytest.raises(GrammarError, match=message) as caught:
        await compiler.matcher(grammar)
    assert caught.value.path == path
    assert len(str(caught.value)) < 400


async def test_the_bounds_of_64_bits_are_bounds_as_others(compiler: GrammarCompiler) -> None:
    for maximum in (2**63 - 1, 2**64 - 1):
        await compiler.matcher(schema(type="integer", minimum=-(2**53), maximum=maximum))


async def test_equal_grammars_are_compiled_once_and_answers_are_apart(compiler: GrammarCompiler, model: Model) -> None:
    grammar = ChoiceGrammar(("ab", "ac"))
    first, second = await asyncio.gather(compiler.matcher(grammar), compiler.matcher(grammar))
    begin = time.perf_counter()
    third = await compiler.matcher(grammar)
    assert time.perf_counter() - begin < 0.01
    a, b = model.tokenizer.encode("ab")
    assert not first.accept(a) and first.accept(b)
    for other in (second, third):
        assert not other.inner.is_stopped() and not other.inner.validate_tokens([b])


async def test_a_request_that_disconnects_does_not_end_another(compiler: GrammarCompiler) -> None:
    grammar = ChoiceGrammar(tuple(f"choice {index}" for index in range(2000)))
    tasks = [asyncio.create_task(compiler.matcher(grammar)) for _ in range(2)]
    await asyncio.sleep(0)
    tasks[0].cancel()
    assert not (await tasks[1]).inner.is_error()


async def test_only_so_many_grammars_wait(compiler: GrammarCompiler) -> None:
    outcomes = await asyncio.gather(
        *(compiler.matcher(RegexGrammar(f"a{{{index}}}")) for index in range(100)), return_exceptions=True
    )
    refused = [each for each in outcomes if isinstance(each, Overloaded)]
    assert len(refused) == 36
    others = [compiler.matcher(RegexGrammar(f"b{{{index}}}")) for index in range(100)]
    refused = [each for each in await asyncio.gather(*others, return_exceptions=True) if isinstance(each, Overloaded)]
    assert refused and all(each.retry_after_s > 0 for each in refused)
    assert not (await compiler.matcher(RegexGrammar("a{99}"))).inner.is_error()


def test_a_check_that_takes_too_much_ends_its_process_and_no_other() -> None:
    checker, before = GrammarChecker(), set(children_of(os.getpid()))
    assert checker.source(RegexGrammar("a"))
    (kept,) = set(children_of(os.getpid())) - before
    with pytest.raises(GrammarError, match="too complex"):
        checker.source(schema(type="integer", multipleOf=9999991))
    assert not is_running(kept)
    assert checker.source(RegexGrammar("b"))
    (other,) = set(children_of(os.getpid())) - before
    checker.close()
    assert not is_running(other)
