"""The grammar that each choice of tools makes of an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.grammar import JsonGrammar, ToolGrammar
from vitrine_vlm.llm_worker.frontend.openai_prompt import chat_to_generation
from vitrine_vlm.llm_worker.frontend.openai_types import ChatRequest
from vitrine_vlm.llm_worker.frontend.request_parsing import parse_request
from vitrine_vlm.llm_worker.frontend.responses_types import ResponsesRequest
from vitrine_vlm.llm_worker.prompt.sampling_defaults import SamplingDefaults
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

SCHEMA = {"type": "object", "properties": {"x": {"type": "integer"}}, "required": ["x"]}
ANY = {"type": "object"}
DEFAULTS = SamplingDefaults(0.7, 0.8, 20, frozenset({258}))


def tool(name: str, strict: bool = False, **fields: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "parameters": SCHEMA, "strict": strict, **fields}}


def chat(**fields: Any) -> ChatRequest:
    body = {"model": "m", "messages": [{"role": "user", "content": "Hi"}], **fields}
    return parse_request(ChatRequest, json.dumps(body).encode())


def named(name: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name}}


def allowed(mode: str, *names: str) -> dict[str, Any]:
    return {"type": "allowed_tools", "allowed_tools": {"mode": mode, "tools": [named(name) for name in names]}}


def grammar(*tools: tuple[str, dict[str, Any]], at_least_one: bool, parallel: bool) -> ToolGrammar:
    return ToolGrammar(tuple((name, json.dumps(schema)) for name, schema in tools), at_least_one, parallel)


TWO = [tool("f"), tool("g", parameters=None)]
BOTH = (("f", SCHEMA), ("g", ANY))


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"tools": TWO}, None),
        ({"tools": TWO, "tool_choice": "auto"}, None),
        ({"tools": TWO, "tool_choice": "required"}, grammar(*BOTH, at_least_one=True, parallel=True)),
        (
            {"tools": TWO, "tool_choice": "required", "parallel_tool_calls": False},
            grammar(*BOTH, at_least_one=True, parallel=False),
        ),
        ({"tools": TWO, "tool_choice": named("f")}, grammar(("f", SCHEMA), at_least_one=True, parallel=False)),
        (
            {"tools": [tool("f"), tool("g", strict=True)]},
            grammar(("f", ANY), ("g", SCHEMA), at_least_one=False, parallel=True),
        ),
        (
            {"tools": TWO, "parallel_tool_calls": False},
            grammar(("f", ANY), ("g", ANY), at_least_one=False, parallel=False),
        ),
        ({"tools": TWO, "tool_choice": allowed("auto", "g")}, grammar(("g", ANY), at_least_one=False, parallel=True)),
        (
            {"tools": TWO, "tool_choice": allowed("required", "f")},
            grammar(("f", SCHEMA), at_least_one=True, parallel=True),
        ),
        (
            {"functions": [TWO[0]["function"]], "function_call": {"name": "f"}},
            grammar(("f", SCHEMA), at_least_one=True, parallel=False),
        ),
        ({"functions": [TWO[0]["function"]]}, grammar(("f", ANY), at_least_one=False, parallel=False)),
    ],
)
def test_the_grammar_of_an_answer(fields: dict[str, Any], expected: ToolGrammar | None, qwen3_vl_folder: Path) -> None:
    request = chat(**fields)
    assert request.offered_tools is not None and request.offered_tools.grammar() == expected
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    assert chat_to_generation(request, tokenizer, DEFAULTS, "id").sampling.grammar == expected


@pytest.mark.parametrize("fields", [{}, {"tools": []}, {"tools": TWO, "tool_choice": "none"}, {"tool_choice": "auto"}])
def test_no_tools_no_grammar(fields: dict[str, Any]) -> None:
    assert chat(**fields).offered_tools is None


def test_responses_have_flat_tools() -> None:
    flat = [{"type": "function", **each["function"]} for each in TWO]
    body = {"model": "m", "input": "Hi", "tools": flat, "tool_choice": {"type": "function", "name": "f"}}
    request = parse_request(ResponsesRequest, json.dumps(body).encode())
    assert request.offered_tools is not None
    assert request.offered_tools.grammar() == grammar(("f", SCHEMA), at_least_one=True, parallel=False)
    assert request.offered_tools.for_template() == [
        {"type": "function", "function": {"name": "f", "parameters": SCHEMA}},
        {"type": "function", "function": {"name": "g"}},
    ]


def test_a_form_of_the_answer_leaves_no_room_for_calls(qwen3_vl_folder: Path) -> None:
    tokenizer = PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)))
    formed = {"response_format": {"type": "json_object"}, "tools": TWO}

    def grammar_of(**fields: Any) -> Any:
        return chat_to_generation(chat(**fields), tokenizer, DEFAULTS, "id").sampling.grammar

    with pytest.raises(BadRequest) as caught:
        grammar_of(**formed)
    assert caught.value.param == "response_format"
    assert isinstance(grammar_of(**formed, tool_choice="none"), JsonGrammar)
    assert isinstance(grammar_of(**formed, tool_choice="required"), ToolGrammar)
