"""Real clients ask for objects, which they parse themselves. The tiny model writes no JSON unless it is made to."""

from __future__ import annotations

from typing import Any

import pytest

from tests.clients.client_process import ClientError
from tests.clients.conftest import Call
from tests.clients.questions import data_url

# By the client's way to ask for an object of a schema.
WAYS = [
    ("openai", "parse"),
    ("openai", "parse_stream"),
    ("openai", "parse_response"),
    ("langchain", "parse"),
    ("litellm", "parse"),
    ("pydantic_ai", "parse"),
    ("pydantic_ai", "parse_response"),
    ("instructor", "parse"),
    ("node_openai", "parse"),
    ("node_openai", "parse_response"),
    ("node_ai_sdk", "parse"),
    ("node_ai_sdk", "parse_stream"),
    ("node_ai_sdk", "parse_response"),
    ("node_ai_sdk_compatible", "parse"),
    ("node_ai_sdk_compatible", "parse_stream"),
]
# These ask for a call of a tool, whose arguments are the object.
WAYS_BY_TOOL = [
    ("langchain", "parse_tool"),
    ("pydantic_ai", "parse_tool"),
    ("pydantic_ai", "parse_response_tool"),
    ("instructor", "parse_tool"),
    ("instructor", "parse_strict_tool"),
]
VALUES: dict[str, tuple[Any, ...]] = {
    "kind": ("circle", "square", "triangle"),
    "color": ("red", "green", "blue"),
    "is_filled": (True, False),
}


def check_shape(value: dict[str, Any]) -> None:
    assert value.keys() == VALUES.keys()
    assert all(value[name] in allowed for name, allowed in VALUES.items())


@pytest.mark.parametrize(("client", "way"), WAYS)
def test_objects_of_a_schema(call: Call, client: str, way: str) -> None:
    check_shape(call(client, way, question="What shape is it?", pictures=[data_url("shapes")]))


def test_objects_of_a_schema_without_pictures(call: Call) -> None:
    answer = call("openai", "parse", question="What shape is it?")
    check_shape(answer)
    assert call("openai", "parse_stream", question="What shape is it?") == answer


@pytest.mark.parametrize(
    "fields",
    [
        {"structured_outputs": {"choice": ["yes", "perhaps"]}},
        {"guided_choice": ["yes", "perhaps"]},
        {"structured_outputs": {"regex": "(yes|perhaps)"}},
        {"guided_regex": "(yes|perhaps)"},
        {"structured_outputs": {"grammar": 'root ::= "yes" | "perhaps"'}},
    ],
    ids=str,
)
def test_vllms_fields(call: Call, fields: dict[str, Any]) -> None:
    assert call("openai", "constrained", question="Is it red?", **fields) in ("yes", "perhaps")


def test_a_schema_that_cannot_be_used_is_the_clients_bad_request(call: Call) -> None:
    wrong = {"type": "json_schema", "json_schema": {"name": "wrong", "schema": {"type": "no type"}}}
    with pytest.raises(ClientError) as caught:
        call("openai", "constrained", question="Hello", response_format=wrong)
    assert "openai.BadRequestError" in caught.value.classes
    assert str(caught.value.others["param"]).startswith("response_format")


@pytest.mark.parametrize(("client", "way"), WAYS_BY_TOOL)
def test_objects_by_a_tool(call: Call, client: str, way: str) -> None:
    check_shape(call(client, way, question="What shape is it?", pictures=[data_url("shapes")]))
