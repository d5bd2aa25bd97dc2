"""Writes a chat as the prompt of its checkpoint: messages, tools and documents through the chat template."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from typing import Any

from jinja2 import Environment
from transformers import PreTrainedTokenizerBase

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.prompt.client_text import ChatText, TextMarks, strings_in, with_strings
from vitrine_vlm.llm_worker.prompt.template_renderer import TemplateRenderer

# CPU time that a template of a request may take; a checkpoint's own is trusted.
_MAX_RENDER_S = 5.0
# Of all strings that a template may write; each is looked through for the beginnings of control tokens first.
_MAX_TEXT_CHARS = 16 * 1024 * 1024
# Names of what a request sets by fields of their own, and of how transformers renders.
_RESERVED = frozenset(inspect.signature(PreTrainedTokenizerBase.apply_chat_template).parameters) | {
    "messages",
    "conversations",
}


@dataclass(frozen=True)
class Chat:
    """What a chat template writes from.

    messages, tools, documents: as chat templates expect them.
    template: the request's own; None for the checkpoint's.
    variables: what else the template may read, by name.
    add_generation_prompt: the assistant's next message begins behind the last one.
    continue_final_message: the last message goes on; then there is no generation prompt.
    """

    messages: Sequence[dict[str, Any]]
    tools: Sequence[dict[str, Any]] = ()
    documents: Sequence[dict[str, Any]] = ()
    template: str | None = None
    variables: Mapping[str, Any] = field(default_factory=dict)
    add_generation_prompt: bool = True
    continue_final_message: bool = False


class ChatTemplate:
    """Renders chats. The client's text in them is marked, see `client_text.py`.

    Of an assistant's message, added tokens that are not special (`<think>`, `<tool_call>`) stay what they are: answers
    have them as text, and templates look for them in the history. All other text of the client is text.

    Args:
        source: the checkpoint's template; None where it has none.
        marks_text: otherwise control tokens in the client's text are control tokens.
        trusts_requests: whether requests may bring templates.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        source: str | None,
        marks_text: bool = True,
        trusts_requests: bool = False,
    ) -> None:
        self._tokenizer = tokenizer
        self._source = source
        self._trusts_requests = trusts_requests
        self._renderer = TemplateRenderer(_MAX_RENDER_S)
        added = tokenizer.added_tokens_decoder.values()
        self._firsts = "".join(sorted({token.content[0] for token in added})) if marks_text else ""
        in_answers = sorted((token.content for token in added if not token.special), key=len, reverse=True)
        self._in_answers = re.compile(f"({'|'.join(map(re.escape, in_answers)) or '(?!)'})")

    def render(self, chat: Chat) -> ChatText:
        """Returns the prompt's text.

        Raises:
            BadRequest: there is no chat template, or it refuses these messages or knows nothing of what they have; a
                template of the request is not allowed, or takes too long; there is more text than can be read.
        """
        source = self._source_for(chat)
        self._check_names(chat, source)
        marked, marks = self._marked(chat)
        text = self._rendered(marked, source) if chat.template is None else self._rendered_apart(marked, source)
        return ChatText(text, marks)

    def _rendered(self, chat: Chat, source: str) -> str:
        try:
            text: str = self._tokenizer.apply_chat_template(
                list(chat.messages),
                tools=list(chat.tools) or None,
                documents=list(chat.documents) or None,
                chat_template=source,
                add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
                continue_final_message=chat.continue_final_message,
                tokenize=False,
                **chat.variables,
            )
        except Exception as error:  # templates may raise any exception
            message = str(error).partition("\n")[0]  # transformers repeats the whole prompt below
            raise BadRequest(f"the chat template refuses these messages: {message}") from error
        return text

    def _rendered_apart(self, chat: Chat, source: str) -> str:
        """Renders in another process; the arguments are those that `apply_chat_template` would make."""
        return self._renderer.render(
            conversations=[list(chat.messages)],
            tools=list(chat.tools) or None,
            documents=list(chat.documents) or None,
            chat_template=source,
            add_generation_prompt=chat.add_generation_prompt and not chat.continue_final_message,
            continue_final_message=chat.continue_final_message,
            **{**self._tokenizer.special_tokens_map, **chat.variables},
        )

    def _source_for(self, chat: Chat) -> str:
        if chat.template is not None:
            if not self._trusts_requests:
                raise BadRequest(
                    "chat_template: this worker renders its checkpoint's own only: leave it out, or ask its operator "
                    "for --trust-request-chat-template",
                    "chat_template",
                )
            return chat.template
        if self._source is None:
            raise BadRequest("this checkpoint has no chat template: send a prompt to /v1/completions instead")
        return self._source

    def _check_names(self, chat: Chat, source: str) -> None:
        """Refuses what the template would ignore or the request may not set.

        Raises:
            BadRequest: see `render`.
        """
        for name in chat.variables:
            if name in _RESERVED or name in self._tokenizer.special_tokens_map:
                param = f"chat_template_kwargs.{name}"
                raise BadRequest(f"{param}: it is no variable that a request may set", param)
        try:
            names = _names_in(source)
        except Exception as error:  # as those of rendering
            raise BadRequest(f"the chat template cannot be read: {error}", _param(chat)) from error
        if chat.continue_final_message and "tool_calls" in chat.messages[-1]:
            param = "continue_final_message"
            raise BadRequest(f"{param}: the last message ends with tool calls, behind which it cannot go on", param)
        has_calls = any("tool_calls" in message for message in chat.messages)
        for name, param, is_used in (
            ("tools", "tools", bool(chat.tools)),
            ("documents", "documents", bool(chat.documents)),
            ("tool_calls", "messages", has_calls),
        ):
            if is_used and name not in names:
                raise BadRequest(f"{param}: this checkpoint's chat template writes no {name} into the prompt", param)

    def _marked(self, chat: Chat) -> tuple[Chat, Mapping[str, str]]:
        texts = list(strings_in([*chat.messages, *chat.tools, *chat.documents, dict(chat.variables)]))
        if (num_chars := sum(map(len, texts))) > _MAX_TEXT_CHARS:
            raise BadRequest(
                f"messages and tools have {num_chars} characters: at most {_MAX_TEXT_CHARS} are read: shorten the text"
            )
        marks = TextMarks(self._firsts, texts)
        if not marks.marks:
            return chat, {}
        marked = replace(
            chat,
            messages=[self._marked_message(message, marks) for message in chat.messages],
            tools=with_strings(list(chat.tools), marks.mark),
            documents=with_strings(list(chat.documents), marks.mark),
            variables=with_strings(dict(chat.variables), marks.mark),
        )
        return marked, marks.marks

    def _marked_message(self, message: dict[str, Any], marks: TextMarks) -> dict[str, Any]:
        marked: dict[str, Any] = with_strings(message, marks.mark)
        if message["role"] == "assistant":
            mark: Callable[[str], str] = lambda text: marks.mark_but(self._in_answers, text)  # noqa: E731
            marked["content"] = with_strings(message["content"], mark)
        return marked


@lru_cache(maxsize=16)
def _names_in(source: str) -> frozenset[str]:
    """The names that a template's expressions have."""
    return frozenset(value for _, kind, value in Environment().lex(source) if kind == "name")


def _param(chat: Chat) -> str | None:
    return "chat_template" if chat.template is not None else None
