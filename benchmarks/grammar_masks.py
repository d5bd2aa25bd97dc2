"""Compares libraries for constrained answers: `python -m benchmarks.grammar_masks TOKENIZER` prints a table.

For schemas of several kinds it measures the start of a grammar (compile, and the first mask), and the time of each
token: its mask and the step to the next state. The tokens are those of an answer that the schema allows. One thread.
Libraries that are not installed are left out: `pip install llguidance xgrammar`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer

_NAME = {"type": "string"}
_PERSON = {
    "type": "object",
    "properties": {
        "name": _NAME,
        "age": {"type": "integer", "minimum": 0, "maximum": 150},
        "alive": {"type": "boolean"},
    },
    "required": ["name", "age", "alive"],
    "additionalProperties": False,
}
_TREE = {
    "$defs": {
        "node": {
            "type": "object",
            "properties": {"value": _NAME, "children": {"type": "array", "items": {"$ref": "#/$defs/node"}}},
            "required": ["value", "children"],
            "additionalProperties": False,
        }
    },
    "$ref": "#/$defs/node",
}
_TEXT = "A plain sentence about a picture, with 2 numbers (17 and 3.5), a \u201cquote\u201d and a new\nline. " * 4
# Name: schema, and an answer that it allows.
_CASES: dict[str, tuple[Any, Any]] = {
    "flat object": (_PERSON, {"name": "Ada Lovelace", "age": 36, "alive": False}),
    "long string": (
        {"type": "object", "properties": {"text": _NAME}, "required": ["text"], "additionalProperties": False},
        {"text": _TEXT},
    ),
    "nested": (
        {
            "type": "object",
            "properties": {"team": {"type": "array", "items": _PERSON, "maxItems": 10}, "lead": _PERSON},
            "required": ["team", "lead"],
            "additionalProperties": False,
        },
        {
            "team": [{"name": f"Person {index}", "age": 20 + index, "alive": True} for index in range(5)],
            "lead": {"name": "Grace Hopper", "age": 85, "alive": False},
        },
    ),
    "enum": (
        {
            "type": "object",
            "properties": {"colour": {"enum": [f"colour {index} of the list" for index in range(60)]}},
            "required": ["colour"],
            "additionalProperties": False,
        },
        {"colour": "colour 42 of the list"},
    ),
    "pattern": (
        {
            "type": "object",
            "properties": {
                "sku": {"type": "string", "pattern": "^[A-Z]{3}-[0-9]{4,6}(-[a-z0-9]+)*$"},
                "mail": {"type": "string", "pattern": "^[a-z0-9._%+-]+@[a-z0-9-]+(\\.[a-z]{2,})+$"},
            },
            "required": ["sku", "mail"],
            "additionalProperties": False,
        },
        {"sku": "ABC-12345-blue-42", "mail": "someone.else+tag@mail.example.org"},
    ),
    "$ref recursion": (
        _TREE,
        {"value": "root", "children": [{"value": f"leaf {index}", "children": []} for index in range(8)]},
    ),
    "50 properties": (
        {
            "type": "object",
            "properties": {f"property_{index}": {"type": ["string", "number", "null"]} for index in range(50)},
            "required": [f"property_{index}" for index in range(50)],
            "additionalProperties": False,
        },
        {f"property_{index}": [f"value {index}", index * 1.5, None][index % 3] for index in range(50)},
    ),
    "50 optional": (
        {
            "type": "object",
            "properties": {f"property_{index}": {"type": "string"} for index in range(50)},
            "additionalProperties": False,
        },
        {f"property_{index}": f"value {index}" for index in range(0, 50, 2)},
    ),
    "any JSON object": ({"type": "object"}, {"a": [1, 2.5, {"b": None}], "text": _TEXT[:100]}),
}


@dataclass(frozen=True)
class Library:
    """compile: a schema as text to a grammar; answer: a grammar to the functions of one answer, `fill` and `accept`."""

    compile: Callable[[str], Any]
    answer: Callable[[Any], tuple[Callable[[np.ndarray[Any, Any]], object], Callable[[int], bool]]]


def llguidance(tokenizer: Any, vocab_size: int) -> Library:
    from llguidance import LLMatcher
    from llguidance.hf import from_tokenizer
    from llguidance.numpy import fill_next_token_bitmask

    wrapped = from_tokenizer(tokenizer, vocab_size)

    def compile_schema(schema: str) -> Any:
        matcher = LLMatcher(wrapped, LLMatcher.grammar_from_json_schema(schema))
        if matcher.is_error():
            raise ValueError(matcher.get_error())
        return matcher

    def answer(grammar: Any) -> Any:
        matcher = grammar.deep_copy()
        return lambda mask: fill_next_token_bitmask(matcher, mask), matcher.consume_token

    return Library(compile_schema, answer)


def xgrammar(tokenizer: Any, vocab_size: int) -> Library:
    import xgrammar

    info = xgrammar.TokenizerInfo.from_huggingface(tokenizer, vocab_size=vocab_size)
    compiler = xgrammar.GrammarCompiler(info, max_threads=1, cache_enabled=False)

    def answer(grammar: Any) -> Any:
        matcher = xgrammar.GrammarMatcher(grammar)
        return lambda mask: matcher.fill_next_token_bitmask(torch.from_numpy(mask)), matcher.accept_token

    return Library(compiler.compile_json_schema, answer)


_LIBRARIES = {"llguidance": llguidance, "xgrammar": xgrammar}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("tokenizer", help="folder with a checkpoint's tokenizer")
    parser.add_argument("--vocab-size", type=int, default=151_936, help="entries of a mask; default: %(default)s")
    parser.add_argument("--repeats", type=int, default=5, help="default: %(default)s")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    tokenizer = AutoTokenizer.from_pretrained(options.tokenizer)
    print("| schema | library | compile | first mask | mask p50 | p99 | worst | step p50 |")
    print("|---|---|---|---|---|---|---|---|")
    for name, make in _LIBRARIES.items():
        if find_spec(name) is None:
            print(f"{name} is not installed", file=sys.stderr)
            continue
        begin = time.perf_counter()
        library = make(tokenizer, options.vocab_size)
        print(f"{name}: import and tokenizer {time.perf_counter() - begin:.2f} s", file=sys.stderr)
        for case, figures in _measure(library, tokenizer, options):
            print(f"| {case} | {name} | {figures} |", flush=True)
    return 0


def _measure(library: Library, tokenizer: Any, options: argparse.Namespace) -> Iterator[tuple[str, str]]:
    mask = np.zeros((1, -(-options.vocab_size // 32)), np.int32)
    every_mask: list[float] = []
    for case, (schema, answer) in _CASES.items():
        text = json.dumps(answer, ensure_ascii=False)
        token_ids = tokenizer.encode(text, add_special_tokens=False)
        compiles: list[float] = []
        firsts: list[float] = []
        masks: list[float] = []
        steps: list[float] = []
        for _ in range(options.repeats):
            begin = time.perf_counter()
            grammar = library.compile(json.dumps(schema))
            compiles.append(time.perf_counter() - begin)
            fill, accept = library.answer(grammar)
            for index, token_id in enumerate(token_ids):
                begin = time.perf_counter()
                fill(mask)
                filled = time.perf_counter()
                assert mask[0, token_id // 32] >> (token_id % 32) & 1, f"{case}: {tokenizer.decode([token_id])!r}"
                stepped = time.perf_counter()
                assert accept(token_id)
                steps.append(time.perf_counter() - stepped)
                (firsts if index == 0 else masks).append(filled - begin)
        every_mask += masks
        yield (
            case,
            f"{_ms(statistics.median(compiles))} | {_ms(statistics.median(firsts))} | {_us(np.percentile(masks, 50))} "
            f"| {_us(np.percentile(masks, 99))} | {_us(max(masks))} | {_us(statistics.median(steps))}",
        )
    p50, p99 = np.percentile(every_mask, [50, 99])
    yield "all", f" | | {_us(p50)} | {_us(p99)} | {_us(max(every_mask))} |"


def _ms(seconds: float) -> str:
    return f"{seconds * 1e3:.2f} ms"


def _us(seconds: Any) -> str:
    return f"{seconds * 1e6:.0f} us"


if __name__ == "__main__":
    sys.exit(main())
