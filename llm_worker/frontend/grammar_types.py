"""The fields by which requests say what an answer must look like, as OpenAI, vLLM and SGLang name them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Annotated, Any, Literal, NamedTuple, TypeAlias

from pydantic import Field, StrictBool

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.grammar import ChoiceGrammar, EbnfGrammar, Grammar, JsonGrammar, RegexGrammar
from vitrine_vlm.service_runtime.json_types import RequestObject

# A schema as an object, or as its text.
Schema: TypeAlias = str | dict[str, Any]
Choices: TypeAlias = Annotated[list[str], Field(min_length=1)]
ANY_OBJECT = JsonGrammar('{"type": "object"}')


class NamedSchema(RequestObject):
    """Of OpenAI's. It is enforced whether `strict` is set or not."""

    strict: StrictBool = False
    schema_: dict[str, Any] = Field(alias="schema")


class ResponseFormat(RequestObject):
    """Of chat and plain completions."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None

    def grammars(self, path: str) -> Iterator[FieldGrammar]:
        """
        Raises:
            BadRequest: the type and the schema do not fit.
        """
        _check_type(self.type, self.json_schema, f"{path}.json_schema")
        if self.type == "json_object":
            yield FieldGrammar(path, ANY_OBJECT)
        if self.json_schema is not None:
            yield FieldGrammar(f"{path}.json_schema.schema", json_grammar(self.json_schema.schema_))


class ResponsesFormat(RequestObject):
    """Of responses, in which it comes back."""

    type: Literal["text", "json_object", "json_schema"]
    name: str = ""
    description: str = ""
    strict: StrictBool = False
    schema_: dict[str, Any] | None = Field(None, alias="schema")

    def grammars(self, path: str) -> Iterator[FieldGrammar]:
        """
        Raises:
            BadRequest: the type and the schema do not fit.
        """
        _check_type(self.type, self.schema_, f"{path}.schema")
        if self.type == "json_object":
            yield FieldGrammar(path, ANY_OBJECT)
        if self.schema_ is not None:
            yield FieldGrammar(f"{path}.schema", json_grammar(self.schema_))


def _check_type(kind: str, schema: object, field: str) -> None:
    # Not in a validator, which would name fields without their aliases.
    if kind == "json_schema" and schema is None:
        raise BadRequest(f"{field}: a format of type json_schema needs it", field)
    if kind != "json_schema" and schema is not None:
        raise BadRequest(f"{field}: a format of type {kind} has none: send the type json_schema", field)


class StructuredOutputs(RequestObject):
    """vLLM's."""

    json_: Schema | None = Field(None, alias="json")
    regex: str | None = None
    choice: Choices | None = None
    grammar: str | None = None
    json_object: StrictBool = False

    def grammars(self, path: str) -> Iterator[FieldGrammar]:
        yield from grammars_of(
            {
                f"{path}.json": self.json_,
                f"{path}.regex": self.regex,
                f"{path}.choice": self.choice,
                f"{path}.grammar": self.grammar,
            }
        )
        if self.json_object:
            yield FieldGrammar(f"{path}.json_object", ANY_OBJECT)


class FieldGrammar(NamedTuple):
    """A grammar, and the path of the field that it is from."""

    field: str
    grammar: Grammar | None


def json_grammar(schema: Schema) -> JsonGrammar:
    return JsonGrammar(schema if isinstance(schema, str) else json.dumps(schema))


def grammars_of(values: dict[str, Any]) -> Iterator[FieldGrammar]:
    """Those of fields, by path, whose last name says what they hold; None for a field that is not set."""
    for path, value in values.items():
        if value is None:
            continue
        name = path.rpartition(".")[2].removeprefix("guided_")
        if name in ("json", "json_schema"):
            yield FieldGrammar(path, json_grammar(value))
        elif name == "regex":
            yield FieldGrammar(path, RegexGrammar(value))
        elif name == "choice":
            yield FieldGrammar(path, ChoiceGrammar(tuple(value)))
        else:
            yield FieldGrammar(path, EbnfGrammar(value))


def only_grammar(grammars: Iterator[FieldGrammar]) -> FieldGrammar:
    """The request's grammar, None for free text.

    Raises:
        BadRequest: there are several.
    """
    first, second = next(grammars, None), next(grammars, None)
    if second is not None and first is not None:
        message = f"{second.field}: {first.field} says already what the answer must look like: send one of them"
        raise BadRequest(message, second.field)
    return first or FieldGrammar("", None)
