"""Real clients have the model call tools, and read the calls themselves."""

from __future__ import annotations

import pytest

from tests.clients.conftest import Call
from tests.clients.test_structured_output import check_shape

CLIENTS = ("openai", "langchain", "litellm", "node_openai", "node_ai_sdk", "node_ai_sdk_compatible")
QUESTION = "Report the shape."
# Vercel's name for it differs.
CALLED = ("tool_calls", "tool-calls")


@pytest.mark.parametrize(("choice", "function"), [("named", "call_tool"), ("required", "call_tool_stream")])
@pytest.mark.parametrize("client", CLIENTS)
def test_a_forced_call_has_valid_arguments(call: Call, client: str, choice: str, function: str) -> None:
    answer = call(client, function, question=QUESTION, choice=choice)
    assert [each["name"] for each in answer["calls"]] == ["report"] * len(answer["calls"])
    assert answer["calls"] and not answer["text"]
    for each in answer["calls"]:
        check_shape(each["arguments"])
    assert answer["finish_reason"] in CALLED


@pytest.mark.parametrize("choice", ["named", "required"])
@pytest.mark.parametrize("client", ["openai", "node_ai_sdk"])
def test_a_forced_call_in_responses(call: Call, client: str, choice: str) -> None:
    answer = call(client, "call_tool_response", question=QUESTION, choice=choice)
    assert answer["calls"] and not answer["text"]
    for each in answer["calls"]:
        assert each["name"] == "report"
        check_shape(each["arguments"])


@pytest.mark.parametrize(
    ("choice", "function"), [("auto", "call_tool"), ("auto", "call_tool_stream"), ("none", "call_tool")]
)
@pytest.mark.parametrize("client", CLIENTS)
def test_a_model_that_calls_no_tool_answers_with_text(call: Call, client: str, choice: str, function: str) -> None:
    """The tiny model has never seen a tool."""
    answer = call(client, function, question="Is there a circle?", choice=choice)
    assert answer["text"] and not answer["calls"]
    assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize("client", ["openai", "langchain", "node_openai", "node_ai_sdk"])
def test_calls_and_results_in_the_history(call: Call, client: str) -> None:
    answer = call(client, "answer_behind_tool", question=QUESTION)
    assert answer["calls"] and all(each["name"] == "report" for each in answer["calls"])
    assert len(set(answer["ids"])) == len(answer["calls"])
    assert isinstance(answer["text"], str)
