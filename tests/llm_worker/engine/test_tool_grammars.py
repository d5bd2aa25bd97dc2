"""Tool calls in Qwen's format, where `<tool_call>` is a token of its own and where it is text."""

from __future__ import annotations

import asyncio
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer

from tests.llm_worker.engine.test_grammars_in_answers import Model
from vitrine_vlm.llm_worker.engine.grammar import Grammar, JsonGrammar, ToolGrammar
from vitrine_vlm.llm_worker.engine.grammar_source import GrammarError

CITY = {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]}
TOOLS = (("weather", json.dumps(CITY)), ("now", '{"additionalProperties": false}'))
WEATHER = '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>'
NOW = '<tool_call>\n{"name": "now", "arguments": {}}\n</tool_call>'


@pytest.fixture(scope="module", params=["text", "tokens"])
def model(request: pytest.FixtureRequest, qwen3_vl_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Model:
    folder = qwen3_vl_folder
    if request.param == "tokens":
        folder = tmp_path_factory.mktemp("added") / "model"
        shutil.copytree(qwen3_vl_folder, folder)
        tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        config = json.loads((folder / "config.json").read_text())
        tokenizer.add_tokens([AddedToken(each, normalized=False) for each in ("<tool_call>", "</tool_call>")])
        tokenizer.save(str(folder / "tokenizer.json"))
        config["text_config"]["vocab_size"] = tokenizer.get_vocab_size() + 7  # some are no tokens, as in Qwen's
        (folder / "config.json").write_text(json.dumps(config))
    model = Model(folder)
    assert (len(model.tokenizer.encode("<tool_call>")) == 1) == (request.param == "tokens")
    request.addfinalizer(model.grammars.close)
    return model


def accepts(model: Model, grammar: Grammar, text: str) -> str:
    """How the answer stands behind this text: "ended", "may end", "open"; "" where the grammar does not allow it."""
    matcher = asyncio.run(model.grammars.matcher(grammar))
    is_ended = False
    for token_id in model.tokenizer.encode(text):
        if is_ended or not matcher.inner.validate_tokens([token_id]):
            return ""
        is_ended = matcher.accept(token_id)
    return "ended" if is_ended else "may end" if matcher.inner.is_accepting() else "open"


@pytest.mark.parametrize(
    ("at_least_one", "parallel", "text", "expected"),
    [
        *((True, parallel, "Sure.", "") for parallel in (False, True)),
        *((True, parallel, "<tool_call>", "open") for parallel in (False, True)),
        *((True, parallel, '<tool_call>\n{"name": "other"', "") for parallel in (False, True)),
        *((True, parallel, '<tool_call>\n{"name": "now", "arguments": {"city"', "") for parallel in (False, True)),
        (True, False, WEATHER, "ended"),
        (True, False, f"{WEATHER}\n", ""),
        (True, True, WEATHER, "may end"),
        (True, True, f"{WEATHER}\n{NOW}", "may end"),
        *((False, parallel, "Sure, a <tool and < more.\n", "may end") for parallel in (False, True)),
        *((False, parallel, "<tool_call>", "open") for parallel in (False, True)),
        *((False, parallel, "<tool_call>No", "") for parallel in (False, True)),
        (False, False, f"Well:\n{WEATHER}", "ended"),
        (False, False, f"{WEATHER}\n", ""),
        (False, True, f"Well:\n{WEATHER} And\n\n{NOW}\nso on", "may end"),
    ],
)
def test_calls_and_text(model: Model, at_least_one: bool, parallel: bool, text: str, expected: str) -> None:
    assert accepts(model, ToolGrammar(TOOLS, at_least_one, parallel), text) == expected


def test_arguments_are_an_object_also_by_an_empty_schema(model: Model) -> None:
    grammar = ToolGrammar((("f", "{}"),), at_least_one=True, parallel=False)
    beginning = '<tool_call>\n{"name": "f", "arguments": '
    assert accepts(model, grammar, beginning + '{"any": [1]}}\n</tool_call>') == "ended"
    assert accepts(model, grammar, beginning + "1") == ""


def test_a_schema_that_cannot_be_used_is_named_by_its_tool(model: Model) -> None:
    tools = (*TOOLS, ("bad", '{"properties": {"a": {"not": {}}}}'))
    with pytest.raises(GrammarError) as caught:
        accepts(model, ToolGrammar(tools, at_least_one=False, parallel=True), "")
    assert caught.value.path == ("2", "parameters", "properties", "a")


def test_text_that_the_tokenizer_would_change_is_written_as_it_is(model: Model) -> None:
    """As special tokens in it, which the answer's text leaves out."""
    special = model.tokenizer.text_of(min(model.eos_token_ids))
    assert len(model.tokenizer.encode(special)) == 1
    matcher = asyncio.run(model.grammars.matcher(JsonGrammar(json.dumps({"const": f"{special} e\u0301"}))))
    token_ids: list[int] = []
    is_ended = False
    while not is_ended:
        allowed = np.flatnonzero(
            np.unpackbits(np.frombuffer(matcher.inner.compute_bitmask(), np.uint8), bitorder="little")
        )
        token_ids.append(int(allowed[0]))
        is_ended = matcher.accept(token_ids[-1])
    text = model.tokenizer.decode(token_ids, skip_special_tokens=True)
    assert json.loads(text) == f"{special} e\u0301"
