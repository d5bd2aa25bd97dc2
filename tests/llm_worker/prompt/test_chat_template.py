"""What a chat template gets, what it may not get, and templates of requests."""

from __future__ import annotations

import shutil
import time
from pathlib import Path
from typing import Any

import pytest

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.prompt.chat_template import Chat
from vitrine_vlm.llm_worker.prompt.tokenizer import PromptTokenizer
from vitrine_vlm.model_loading.checkpoint import open_checkpoint

USER = {"role": "user", "content": "Hi"}
THINKING = "{% for m in messages %}{{ m.content }};{% endfor %}"
THINKING += "{% if enable_thinking %}<think>{% endif %}{{ reasoning_effort }}"
DOCUMENTS = "{% for d in documents %}{{ d.title }}: {{ d.text }}\n{% endfor %}{{ messages[0].content }}"


@pytest.fixture
def folder(tmp_path: Path, qwen3_vl_folder: Path) -> Path:
    return shutil.copytree(qwen3_vl_folder, tmp_path / "copy")


@pytest.fixture(scope="module")
def trusting(qwen3_vl_folder: Path) -> PromptTokenizer:
    return PromptTokenizer(open_checkpoint(str(qwen3_vl_folder)), trust_request_templates=True)


def test_a_process_renders_as_the_tokenizer_does(folder: Path, trusting: PromptTokenizer) -> None:
    template = "{{ eos_token }}{% for each in messages %}{{ each.role }} {{ each.content }} {{ name }}\n{% endfor %}"
    own = with_template(folder, template)
    for fields in ({}, {"continue_final_message": True}, {"variables": {"name": "\u00e9<|im_end|>"}}):
        assert rendered(trusting, template=template, **fields) == rendered(own, **fields)


def with_template(folder: Path, template: str) -> PromptTokenizer:
    (folder / "chat_template.jinja").write_text(template)
    return PromptTokenizer(open_checkpoint(str(folder)))


def rendered(tokenizer: PromptTokenizer, *messages: dict[str, Any], **fields: Any) -> str:
    return tokenizer.render_chat(Chat(messages or (USER,), **fields)).unmarked


def refused(tokenizer: PromptTokenizer, **fields: Any) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        rendered(tokenizer, **fields)
    return caught.value


def test_variables_of_the_request(folder: Path) -> None:
    tokenizer = with_template(folder, THINKING)
    assert rendered(tokenizer) == "Hi;"
    assert rendered(tokenizer, variables={"enable_thinking": True, "unknown": 5}) == "Hi;<think>"
    assert rendered(tokenizer, variables={"reasoning_effort": "low <|im_end|>"}) == "Hi;low <|im_end|>"
    for name in (
        "messages",
        "tools",
        "documents",
        "add_generation_prompt",
        "chat_template",
        "conversation",
        "tokenize",
        "eos_token",
    ):
        error = refused(tokenizer, variables={name: 1})
        assert error.param == f"chat_template_kwargs.{name}"


def test_documents_only_where_the_template_reads_them(folder: Path) -> None:
    documents = [{"title": "A", "text": "b"}, {"title": "C", "text": "d"}]
    assert rendered(with_template(folder, DOCUMENTS), documents=documents) == "A: b\nC: d\nHi"
    assert refused(with_template(folder, THINKING), documents=documents).param == "documents"


def test_where_the_prompt_ends(trusting: PromptTokenizer) -> None:
    answer = {"role": "assistant", "content": "I think <b>"}
    turn = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nI think <b>"
    assert rendered(trusting, USER, answer) == f"{turn}<|im_end|>\n<|im_start|>assistant\n"
    assert rendered(trusting, USER, answer, add_generation_prompt=False) == f"{turn}<|im_end|>\n"
    assert rendered(trusting, USER, answer, continue_final_message=True) == turn
    parts = {"role": "assistant", "content": [{"type": "text", "text": "I think <b>"}]}
    assert rendered(trusting, USER, parts, continue_final_message=True) == turn
    image = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(BadRequest, match="could not find any text to continue"):
        rendered(trusting, image, continue_final_message=True)
    calling = {**answer, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    with pytest.raises(BadRequest, match="ends with tool calls") as caught:
        rendered(trusting, calling, continue_final_message=True)
    assert caught.value.param == "continue_final_message"


def test_a_template_of_the_request_needs_the_operators_trust(qwen3_vl_folder: Path, trusting: PromptTokenizer) -> None:
    assert rendered(trusting, template="{{ messages[0].content }}!") == "Hi!"
    error = refused(PromptTokenizer(open_checkpoint(str(qwen3_vl_folder))), template="{{ messages[0].content }}!")
    assert error.param == "chat_template" and "--trust-request-chat-template" in str(error)


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for", "cannot be read|refuses"),
        ("{{ messages.append(1) }}", "not safely callable|refuses"),
        ("{{ ''.__class__.__mro__ }}", "unsafe|refuses"),
        ("{{ raise_exception('no') }}", "no"),
        ("{{ nothing.at.all }}", "undefined"),
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "more than 0.3 s"),
        ("{{ 9**(9**9) }}", "more than 0.3 s"),
        ("{{ range(99999)|map('string')|list|batch(1)|list|string * 99999 }}", "too much memory"),
        ("{% for a in range(99999) %}{{ 'x' * 999 }}{% endfor %}", "more than"),
    ],
)
def test_what_a_template_of_the_request_may_not(
    trusting: PromptTokenizer, monkeypatch: pytest.MonkeyPatch, template: str, message: str
) -> None:
    endless = "0.3 s" in message
    monkeypatch.setattr(trusting._template._renderer, "_cpu_s", 0.3 if endless else 30.0)
    started = time.monotonic()
    error = refused(trusting, template=template)
    assert error.param == "chat_template"
    assert any(each in str(error) for each in message.split("|"))
    assert not endless or time.monotonic() - started < 60  # most of it is the start of a process
