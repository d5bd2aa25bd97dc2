"""The tools that an answer may call: in the prompt, and as the grammar of the answer."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.grammar import ToolGrammar
from vitrine_vlm.llm_worker.frontend.tool_types import FunctionDefinition, ToolChoice

_ANY_ARGUMENTS: dict[str, Any] = {"type": "object"}


@dataclass(frozen=True)
class OfferedTools:
    """parallel: whether one answer may have several calls. legacy: the request has `functions` instead of `tools`.

    field: where the request has a function, with {} for its index.
    """

    functions: tuple[FunctionDefinition, ...]
    choice: ToolChoice
    parallel: bool = True
    legacy: bool = False
    field: str = "tools.{}.function"

    @property
    def callable(self) -> tuple[FunctionDefinition, ...]:
        names = self.choice.names
        return tuple(each for each in self.functions if not names or each.name in names)

    @property
    def fields(self) -> tuple[str, ...]:
        """Where the request has each of those that may be called."""
        names = self.names
        return tuple(self.field.format(index) for index, each in enumerate(self.functions) if each.name in names)

    @property
    def names(self) -> frozenset[str]:
        """Of those that may be called."""
        return frozenset(each.name for each in self.callable)

    def for_template(self) -> list[dict[str, Any]]:
        """The tools as chat templates expect them: all of them, and of each what describes it."""
        return [
            {
                "type": "function",
                "function": each.model_dump(include={"name", "description", "parameters"}, exclude_none=True),
            }
            for each in self.functions
        ]

    def grammar(self) -> ToolGrammar | None:
        """What the answer must look like; None where it is the model's own choice."""
        is_required = self.choice.mode == "required"
        is_strict = any(each.strict for each in self.callable)
        if not (is_required or is_strict or self.choice.names) and self.parallel:
            return None
        tools = tuple(
            (each.name, json.dumps(_schema(each, exact=is_required or each.strict), ensure_ascii=False))
            for each in self.callable
        )
        return ToolGrammar(tools, at_least_one=is_required, parallel=self.parallel and not self.choice.is_one)


def offered_tools(
    functions: Sequence[FunctionDefinition],
    choice: ToolChoice | None,
    parallel: bool = True,
    legacy: bool = False,
    field: str = "tools.{}.function",
) -> OfferedTools | None:
    """Returns the tools that an answer may call; None where it may call none, which the prompt then has none of.

    Args:
        choice: None where the request leaves it out.
        legacy: see `OfferedTools`.
        field: see `OfferedTools`.

    Raises:
        BadRequest: two tools of one name, or a choice of tools that the request does not have.
    """
    choice = choice or ToolChoice("auto")
    names = [each.name for each in functions]
    # `dict` keeps their order for the message below.
    seen: dict[str, None] = {}
    for index, name in enumerate(names):
        if name in seen:
            param = f"{field.format(index)}.name"
            raise BadRequest(f"{param}: there are two tools named {name!r}", param)
        seen[name] = None
    param = "function_call" if legacy else "tool_choice"
    if unknown := [name for name in choice.names if name not in seen]:
        raise BadRequest(
            f"{param}: no tool is named {unknown[0][:200]!r}: there are {', '.join(names) or 'none'}", param
        )
    if choice.mode == "required" and not names:
        raise BadRequest(f"{param}: a call is required, and there are no tools: send some", param)
    if choice.mode == "none" or not names:
        return None
    return OfferedTools(tuple(functions), choice, parallel and not legacy, legacy, field)


def _schema(function: FunctionDefinition, exact: bool) -> dict[str, Any]:
    return (function.parameters if exact else None) or _ANY_ARGUMENTS
