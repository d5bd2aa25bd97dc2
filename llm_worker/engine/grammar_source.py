"""Grammars in the language of llguidance, which makes token masks from them; its checks of what clients send.

Runs in a process of its own (`grammar_check.py`), as a grammar may be made so that these checks do not end.
Imports nothing that is slow to import.

Source: llguidance's docs/syntax.md (1.9), for rules, lexemes and `lazy`.
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, TypeAlias

from llguidance import LLMatcher, LLParserLimits, LLTokenizer, TokenizerWrapper
from llguidance.gbnf_to_lark import any_to_lark

from vitrine_vlm.llm_worker.engine.grammar import (
    ChoiceGrammar,
    EbnfGrammar,
    Grammar,
    JsonGrammar,
    RegexGrammar,
    ToolGrammar,
)

# Keys and indices from a grammar, or a schema in it, to a part of it.
Path: TypeAlias = tuple[str, ...]
_MAX_MESSAGE_LENGTH = 300
# CPU time for finding the schema that is at fault.
_MAX_SEARCH_S = 0.3
# Whitespace between the parts of a JSON value: any, but a model that writes nothing else has to end at some time.
_WHITESPACE = r"[ \n\r\t]{0,40}"
# In the arguments of a call there is as much as json.dumps writes: a weak model would fill its answer with more.
_TOOL_WHITESPACE = " ?"
# llguidance has all numbers as doubles, which hold no larger integers exactly.
_MAX_INTEGER, _MAX_INT64 = 2**53, 2**63 - 1
_LOWER_BOUNDS, _UPPER_BOUNDS = ("minimum", "exclusiveMinimum"), ("maximum", "exclusiveMaximum")
_ONE_SCHEMA = ("items", "additionalProperties", "additionalItems")
_LIST_OF_SCHEMAS = ("anyOf", "oneOf", "allOf", "prefixItems", "items")
_SCHEMAS_BY_NAME = ("$defs", "definitions", "properties", "patternProperties")


class GrammarError(Exception):
    """A grammar cannot be used. path: of the part of it that is at fault; empty for the whole."""

    def __init__(self, message: str, path: Path = ()) -> None:
        super().__init__(message)
        self.path = path


def parser_limits() -> LLParserLimits:
    """The limits of a grammar's size and of the work for a token, about 10 ms at most."""
    return LLParserLimits(
        step_lexer_fuel=50_000,
        step_max_items=5_000,
        max_items_in_row=1_000,
        max_lexer_states=50_000,
        max_grammar_size=100_000,
        verbose_errors=False,
    )


def grammar_source(grammar: Grammar) -> str:
    """Returns the grammar in the language of llguidance. It may take as long as the grammar is made to.

    Raises:
        GrammarError: it cannot be used.
    """
    match grammar:
        case JsonGrammar(schema):
            return _json_source(schema)
        case RegexGrammar(pattern):
            source = LLMatcher.grammar_from_regex(pattern)
        case ChoiceGrammar(choices):
            # One expression, which needs less than a rule for each of many choices.
            source = LLMatcher.grammar_from_regex("|".join(f"(?:{_escaped(each)})" for each in choices))
        case EbnfGrammar(text):
            source = LLMatcher.grammar_from_lark(_lark(text))
        case ToolGrammar():
            return _tool_source(grammar)
    _check(source)
    return source


def _json_source(schema_text: str) -> str:
    schema = _parsed(schema_text)
    source: str = LLMatcher.grammar_from_json_schema(json.dumps(schema))
    if message := _error_of(source):
        raise GrammarError(message, _path_of_fault(schema, message))
    _check_integers(schema)
    return source


def _parsed(schema_text: str) -> dict[str, Any]:
    """The schema, with the options of llguidance that hold here."""
    try:
        schema = json.loads(schema_text)
    except (ValueError, RecursionError) as error:
        raise GrammarError(f"the schema is no JSON: {error}") from None
    if schema is True:
        schema = {}
    if not isinstance(schema, dict):
        raise GrammarError(f"a schema is an object, this one is of type {type(schema).__name__}")
    # Whatever the client's schema has there could let keywords be ignored.
    return {**schema, "x-guidance": {"whitespace_pattern": _WHITESPACE}}


def _check_integers(schema: dict[str, Any], path: Path = ()) -> None:
    """
    Raises:
        GrammarError: the schema, or one in it, has an integer that would be rounded to another.
    """
    for key in ("const", "enum", *_LOWER_BOUNDS, *_UPPER_BOUNDS):
        for number in _integers(schema.get(key)):
            # Above the largest 64-bit integer no answer has any, so a larger bound changes nothing.
            if abs(number) > _MAX_INTEGER and not (key in _UPPER_BOUNDS and number >= _MAX_INT64):
                raise GrammarError(f"{number} is beyond 2**53: send smaller numbers, or a string", (*path, key))
    for steps, each in _inner_schemas(schema):
        _check_integers(each, (*path, *steps))


def _integers(value: Any) -> Iterator[int]:
    """Every integer of a JSON value."""
    if isinstance(value, int):
        yield value
    elif isinstance(value, list | dict):
        for each in value.values() if isinstance(value, dict) else value:
            yield from _integers(each)


def _tool_source(grammar: ToolGrammar) -> str:
    for index, (_, parameters) in enumerate(grammar.tools):
        try:
            _json_source(json.dumps({"type": "object", **_parsed(parameters)}))
        except GrammarError as error:
            raise GrammarError(str(error), (str(index), "parameters", *error.path)) from None
    rules = [f"call: {' | '.join(f'call_{index}' for index in range(len(grammar.tools)))}"]
    for index, (name, parameters) in enumerate(grammar.tools):
        # Spaces as Python's json.dumps writes them, from which models have learned.
        beginning = '\n{"name": ' + json.dumps(name, ensure_ascii=False) + ', "arguments": '
        rules.append(f"call_{index}: {_text(beginning)} arguments_{index} {_text('}' + chr(10) + '</tool_call>')}")
        schema = {"type": "object", **_parsed(parameters), "x-guidance": {"whitespace_pattern": _TOOL_WHITESPACE}}
        rules.append(f"arguments_{index}: %json {json.dumps(schema)}")
    begin = _text("<tool_call>")
    if grammar.at_least_one:
        more = f" ({_text(chr(10))} {begin} call)*" if grammar.parallel else ""
        rules.append(f"start: {begin} call{more}")
    else:
        # A lazy lexeme ends as soon as it matches, so that text ends with the first `<tool_call>` in it.
        rules.append(f"begin[lazy]: TEXT {begin}")
        rules.append("TEXT: /(.|\\n)*/")
        rules.append("start: (begin call)* end" if grammar.parallel else "start: begin call | end")
        rules.append("end: TEXT")
    source = LLMatcher.grammar_from_lark("\n".join(rules))
    _check(source)
    return source


def _text(text: str) -> str:
    """The text as a string of Lark, which has JSON's escapes."""
    return json.dumps(text, ensure_ascii=False)


def _escaped(text: str) -> str:
    """A regular expression of Rust's that matches this text only; `re.escape` escapes more than Rust allows."""
    return re.sub(r"[\\.+*?()|\[\]{}^$#&~/-]", r"\\\g<0>", text)


def _lark(text: str) -> str:
    """The grammar in Lark's notation, from that or from GBNF."""
    try:
        converted: str = any_to_lark(text)
    except (Exception, RecursionError) as error:  # of a parser of what clients send, with errors of many kinds
        raise GrammarError(f"the grammar cannot be read: {error}"[:_MAX_MESSAGE_LENGTH]) from None
    return converted


def _check(source: str) -> None:
    if error := _error_of(source):
        raise GrammarError(error)


def _error_of(source: str) -> str:
    """Why llguidance refuses the grammar; empty where it does not."""
    # Not `validate_grammar`, which leaves out the lexer, where most of the work may be.
    matcher = LLMatcher(_byte_tokenizer(), source, limits=parser_limits(), log_level=0)
    if not matcher.is_error():
        matcher.compute_bitmask()  # is refused where the first token needs too much work, or there is none
    message = matcher.get_error()
    if message.startswith("NoExtension"):
        message = "no answer fits"
    for details in ("<backtrace>", "\n<", "\n  while processing"):  # the last names a schema, which `Path` does
        message = message.partition(details)[0]
    return message.strip()[:_MAX_MESSAGE_LENGTH]


class _Bytes:
    """A vocabulary of single bytes and an end token."""

    bos_token_id = None
    eos_token_id = 256
    special_token_ids = (256,)
    tokens = (*(bytes([each]) for each in range(256)), b"")

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


@cache
def _byte_tokenizer() -> LLTokenizer:
    return LLTokenizer(TokenizerWrapper(_Bytes()))


def _path_of_fault(schema: dict[str, Any], error: str) -> Path:
    """The path of the innermost schema with this error: llguidance does not say where it is."""
    shared = {key: schema[key] for key in ("$defs", "definitions", "x-guidance") if key in schema}
    path: Path = ()
    inner, deadline = schema, time.process_time() + _MAX_SEARCH_S
    while True:
        for steps, each in _inner_schemas(inner):
            if time.process_time() > deadline:
                return path
            if _error_of(LLMatcher.grammar_from_json_schema(json.dumps({**shared, **each}))) == error:
                path, inner = (*path, *steps), each
                break
        else:
            return path


def _inner_schemas(schema: dict[str, Any]) -> Iterator[tuple[Path, dict[str, Any]]]:
    for key in _SCHEMAS_BY_NAME:
        if isinstance(by_name := schema.get(key), dict):
            yield from (((key, name), each) for name, each in by_name.items() if isinstance(each, dict))
    for key in _LIST_OF_SCHEMAS:
        if isinstance(schemas := schema.get(key), list):
            yield from (((key, str(index)), each) for index, each in enumerate(schemas) if isinstance(each, dict))
    for key in _ONE_SCHEMA:
        if isinstance(each := schema.get(key), dict):
            yield (key,), each
