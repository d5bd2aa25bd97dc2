"""What an answer must look like: plain values, which are compared, hashed, and sent to other workers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias


@dataclass(frozen=True)
class JsonGrammar:
    """A JSON value. schema: its JSON schema, as text; '{"type": "object"}' allows any object."""

    schema: str


@dataclass(frozen=True)
class RegexGrammar:
    """A text that a regular expression matches from its first to its last character."""

    pattern: str


@dataclass(frozen=True)
class ChoiceGrammar:
    """One of several texts, exactly."""

    choices: tuple[str, ...]


@dataclass(frozen=True)
class EbnfGrammar:
    """A text that a context-free grammar derives from its rule `root`. source: the grammar, in GBNF."""

    source: str


@dataclass(frozen=True)
class ToolGrammar:
    """Tool calls in the format of Hermes, `<tool_call>\\n{"name": ..., "arguments": {...}}\\n</tool_call>`.

    tools: the name of each tool and the JSON schema of its arguments, as text.
    at_least_one: whether the answer begins with a call; otherwise it is free text, in which calls may stand.
    parallel: whether more than one call may be made.
    """

    tools: tuple[tuple[str, str], ...]
    at_least_one: bool
    parallel: bool


Grammar: TypeAlias = JsonGrammar | RegexGrammar | ChoiceGrammar | EbnfGrammar | ToolGrammar


def num_characters(grammar: Grammar) -> int:
    """The length of a grammar's texts."""
    match grammar:
        case JsonGrammar(text) | RegexGrammar(text) | EbnfGrammar(text):
            return len(text)
        case ChoiceGrammar(choices):
            return sum(len(each) for each in choices)
        case ToolGrammar(tools):
            return sum(len(name) + len(schema) for name, schema in tools)
