"""Tools in requests' bodies: their definitions, which of them may be called, and calls of the history."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated, Any, Literal, TypeAlias

from jsonschema import Draft202012Validator
from jsonschema.exceptions import SchemaError
from pydantic import AfterValidator, BeforeValidator, Field, StrictBool
from pydantic_core import from_json

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.json_limits import check_json, num_values
from vitrine_vlm.service_runtime.json_types import RequestObject

# OpenAI's own limit is 128.
MAX_TOOLS = 1024
_MAX_SCHEMA_LENGTH = 256 * 1024
# To check a schema takes up to half a millisecond a value.
_MAX_SCHEMA_VALUES = 8192
_MAX_MESSAGE_LENGTH = 300
_CHOICES = '"none", "auto", "required", a function\'s name in OpenAI\'s form, or allowed_tools'


def _json_object(value: object) -> object:
    """The object of an object's JSON text; no text is an object without fields."""
    if not isinstance(value, str):
        return value
    try:
        # As bodies are parsed: json.loads recurses as deep as the text does, and makes strings that have no UTF-8.
        check_json(value.encode())
        return from_json(value or "{}")
    except BadRequest as error:
        raise ValueError(str(error)) from None
    except ValueError as error:
        raise ValueError(f"it is no JSON: {error}") from None


def _check_parameters(schema: dict[str, Any]) -> dict[str, Any]:
    if schema.get("type", "object") != "object":
        raise ValueError(f"arguments are an object, and this is the schema of {schema['type']!r}"[:_MAX_MESSAGE_LENGTH])
    text = json.dumps(schema)
    if len(text) > _MAX_SCHEMA_LENGTH:
        raise ValueError(
            f"the schema has {len(text)} characters as JSON: at most {_MAX_SCHEMA_LENGTH} are accepted: shorten it"
        )
    if (num := num_values(text.encode(), _MAX_SCHEMA_VALUES)) > _MAX_SCHEMA_VALUES:
        raise ValueError(f"the schema has {num} values or more: at most {_MAX_SCHEMA_VALUES} are accepted: shorten it")
    if fault := _schema_fault(text):
        raise ValueError(fault)
    return schema


@lru_cache(maxsize=256)  # milliseconds a schema, and each request of an agent brings the same
def _schema_fault(schema: str) -> str | None:
    try:
        parsed = json.loads(schema)
        if fault := _fault_of_names(parsed):
            return fault
        Draft202012Validator.check_schema(parsed)
    except SchemaError as error:
        return f"it is no JSON schema: at {error.json_path} {error.message}"[:_MAX_MESSAGE_LENGTH]
    except RecursionError:
        return "its schemas are nested too deep: send a flatter one"
    return None


def _fault_of_names(schema: Any) -> str | None:
    """Finds a list that must be of names and is not: whether all differ would take a time that grows by its square."""
    if isinstance(schema, list):
        return next(filter(None, map(_fault_of_names, schema)), None)
    if not isinstance(schema, dict):
        return None
    for key, value in schema.items():
        if key in ("const", "default", "enum", "examples"):
            continue
        lists = value.values() if key == "dependentRequired" and isinstance(value, dict) else [value]
        if key in ("required", "type", "dependentRequired"):
            for names in lists:
                if isinstance(names, list) and not all(isinstance(each, str) for each in names):
                    return f"it is no JSON schema: {key} has a list with more than strings in it"
        if fault := _fault_of_names(value):
            return fault
    return None


CallArguments: TypeAlias = Annotated[dict[str, Any], BeforeValidator(_json_object)]
Parameters: TypeAlias = Annotated[dict[str, Any], AfterValidator(_check_parameters)]
# As they can stand in JSON and in a grammar without escapes.
ToolName: TypeAlias = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.:/-]{1,128}$")]


class FunctionTyped(RequestObject):
    type: Literal["function"]


class FunctionDefinition(RequestObject):
    """parameters: the JSON schema of the arguments. strict: the arguments follow it exactly."""

    name: ToolName
    description: str | None = None
    parameters: Parameters | None = None
    strict: StrictBool = False


class Tool(FunctionTyped):
    function: FunctionDefinition


class FunctionTool(FunctionDefinition, FunctionTyped):
    """A tool as `/v1/responses` has it, without an object of its own for the function."""


class CalledFunction(RequestObject):
    """arguments: JSON, as text or as the object itself."""

    name: str
    arguments: CallArguments = Field({})


class ToolCall(RequestObject):
    id: str | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


@dataclass(frozen=True)
class ToolChoice:
    """names: the only tools that may be called; all where empty. is_one: exactly one call is asked for."""

    mode: Literal["none", "auto", "required"]
    names: tuple[str, ...] = ()
    is_one: bool = False


def _tool_choice(value: object) -> ToolChoice:
    """Reads the forms of chat completions, of responses, and of the older `function_call`."""
    match value:
        case "none" | "auto" | "required":
            return ToolChoice(value)
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return ToolChoice("required", (name,), is_one=True)
        case {"name": str(name), **rest} if not rest:
            return ToolChoice("required", (name,), is_one=True)
        case {"type": "allowed_tools", "allowed_tools": {"mode": "auto" | "required" as mode, "tools": list(tools)}} | {
            "type": "allowed_tools",
            "mode": "auto" | "required" as mode,
            "tools": list(tools),
        } if tools:
            return ToolChoice(mode, tuple(_name_of(tool) for tool in tools))
    raise ValueError(f"send {_CHOICES}")


def _name_of(tool: object) -> str:
    match tool:
        case {"type": "function", "function": {"name": str(name)}} | {"type": "function", "name": str(name)}:
            return name
    raise ValueError("tools are allowed by their type, function, and their name")


ToolChoiceField: TypeAlias = Annotated[ToolChoice, BeforeValidator(_tool_choice)]
