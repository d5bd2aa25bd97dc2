"""What happens to a field of a request: the three rules, and the walk over a body that applies them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any, TypeAlias

from vitrine_vlm.errors import BadRequest

_MAX_SHOWN = 80
_KIND_NAMES: dict[type, str] = {
    str: "a string",
    bool: "true or false",
    int: "an integer",
    float: "a number",
    list: "a list",
    dict: "an object",
}


class Rule(StrEnum):
    """HONOURED fields do what they say. REFUSED ones get 400 unless their value changes nothing. INFORMATIVE ones are
    accepted, and counted by name, as unknown ones are."""

    HONOURED = "honoured"
    REFUSED = "refused"
    INFORMATIVE = "informative"


@dataclass(frozen=True)
class Field:
    """The rule of one field. Null passes for all of them, as some clients write fields that were not set.

    note: what it means here, for the docs. inside: the fields of its object, or of the objects in its list.
    by_type: the same for objects of several kinds, by their field `type`; the first kind where that is left out.
    neutral: values of a refused field that pass. kinds: the JSON types of an informative field; any where empty.
    """

    rule: Rule
    note: str = ""
    inside: FieldTable | None = None
    by_type: Mapping[str, FieldTable] | None = None
    neutral: tuple[Any, ...] = ()
    kinds: tuple[type, ...] = ()

    def fields_of(self, value: Mapping[str, Any]) -> FieldTable | None:
        """The fields of an object in this field's value; None where all names are the client's own."""
        if self.by_type is None:
            return self.inside
        return self.by_type[value.get("type") or next(iter(self.by_type))]


FieldTable: TypeAlias = Mapping[str, Field]


def honoured(
    note: str = "", inside: FieldTable | None = None, by_type: Mapping[str, FieldTable] | None = None
) -> Field:
    return Field(Rule.HONOURED, note, inside, by_type)


def refused(*neutral: Any, note: str = "") -> Field:
    return Field(Rule.REFUSED, note, neutral=neutral)


def informative(*kinds: type, note: str = "") -> Field:
    return Field(Rule.INFORMATIVE, note, kinds=kinds)


@dataclass(frozen=True)
class UnusedFields:
    """Names of a body's fields that change nothing, without indices: "messages.name"."""

    informative: set[str] = field(default_factory=set)
    unknown: set[str] = field(default_factory=set)


def apply_rules(table: FieldTable, body: Mapping[str, Any]) -> UnusedFields:
    """Returns the fields that change nothing.

    Args:
        body: its honoured fields have been validated.

    Raises:
        BadRequest: a refused field has a value that is not neutral, or an informative one is of another type.
    """
    unused = UnusedFields()
    _walk(table, body, (), (), unused)
    return unused


def _walk(
    table: FieldTable, body: Mapping[str, Any], path: tuple[str, ...], name: tuple[str, ...], unused: UnusedFields
) -> None:
    """path: where `body` stands in the request; name: the same without indices."""
    for key, value in body.items():
        key_path, key_name = (*path, key), (*name, key)
        rule = table.get(key)
        if rule is None:
            unused.unknown.add(".".join(key_name))
        elif value is None:
            continue
        elif rule.rule is Rule.REFUSED:
            _check_neutral(rule, value, ".".join(key_path))
        elif rule.rule is Rule.INFORMATIVE:
            _check_kind(rule, value, ".".join(key_path))
            unused.informative.add(".".join(key_name))
        else:
            for steps, each in _objects(value):
                if (inner := rule.fields_of(each)) is not None:
                    _walk(inner, each, (*key_path, *steps), key_name, unused)


def _objects(value: Any) -> Iterator[tuple[tuple[str, ...], Mapping[str, Any]]]:
    """The value itself, or the items of a list, as far as they are objects, with their indices."""
    if isinstance(value, dict):
        yield (), value
    elif isinstance(value, list):
        yield from (((str(index),), each) for index, each in enumerate(value) if isinstance(each, dict))


def _check_neutral(rule: Field, value: Any, path: str) -> None:
    if not any(_equal(value, neutral) for neutral in rule.neutral):
        passing = ", ".join(json.dumps(each) for each in (None, *rule.neutral))
        raise BadRequest(f"{path}: {_shown(value)} is not supported here: leave it out, or send {passing}", path)


def _check_kind(rule: Field, value: Any, path: str) -> None:
    if rule.kinds and not any(_is_a(value, kind) for kind in rule.kinds):
        expected = " or ".join(_KIND_NAMES[kind] for kind in rule.kinds)
        raise BadRequest(f"{path}: {_shown(value)} is not {expected}", path)


def _equal(value: Any, neutral: Any) -> bool:
    """Whether they are the same in JSON, where true is not 1; nulls in objects count as left out."""
    if isinstance(value, dict):
        value = {key: each for key, each in value.items() if each is not None}
    return isinstance(value, bool) == isinstance(neutral, bool) and bool(value == neutral)


def _is_a(value: Any, kind: type) -> bool:
    if isinstance(value, bool) or kind is bool:
        return isinstance(value, bool) and kind is bool
    return isinstance(value, int | float) if kind is float else isinstance(value, kind)


def _shown(value: Any) -> str:
    """The beginning of the value as JSON."""
    try:
        text = json.dumps(value, ensure_ascii=False)
    except (RecursionError, ValueError):  # a number of thousands of digits
        text = f"a {type(value).__name__}"
    return text if len(text) <= _MAX_SHOWN else text[:_MAX_SHOWN] + "..."
