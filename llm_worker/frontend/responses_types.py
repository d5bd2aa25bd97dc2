"""The honoured fields of `/v1/responses`, with their types and ranges. All others are in `responses_fields.py`."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import Discriminator, Field, StrictBool, Tag, ValidationInfo, field_validator

from vitrine_vlm.llm_worker.engine.sampling_checks import MAX_LOGPROBS
from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable
from vitrine_vlm.llm_worker.frontend.grammar_types import FieldGrammar, ResponsesFormat
from vitrine_vlm.llm_worker.frontend.media_parts import ImagePart, ImageUrl, InputImage, MediaContent
from vitrine_vlm.llm_worker.frontend.openai_types import (
    MAX_MESSAGES,
    MAX_PARTS,
    ContentPart,
    GenerationBody,
    Message,
    RequestObject,
    TextPart,
    WholeNumber,
)
from vitrine_vlm.llm_worker.frontend.responses_fields import RESPONSES
from vitrine_vlm.llm_worker.frontend.tool_calls import OfferedTools, offered_tools
from vitrine_vlm.llm_worker.frontend.tool_types import (
    MAX_TOOLS,
    CallArguments,
    CalledFunction,
    FunctionTool,
    ToolCall,
    ToolChoiceField,
)

# OpenAI's own limit is 16. Events have all of it.
_MAX_METADATA = 256


class InputText(RequestObject):
    type: Literal["input_text", "output_text"]
    text: str


InputPart: TypeAlias = Annotated[InputText | InputImage, Field(discriminator="type")]
InputParts: TypeAlias = Annotated[list[InputPart], Field(max_length=MAX_PARTS)]


class InputMessage(RequestObject):
    type: Literal["message"] = "message"
    role: Literal["system", "developer", "user", "assistant"]
    content: str | InputParts

    def message(self) -> Message:
        return Message(role=self.role, content=_content(self.content))


class InputCall(RequestObject):
    """A call that an answer has made."""

    type: Literal["function_call"]
    call_id: str
    name: str
    arguments: CallArguments

    def call(self) -> ToolCall:
        return ToolCall(id=self.call_id, function=CalledFunction(name=self.name, arguments=self.arguments))


class InputCallOutput(RequestObject):
    """What the called function has returned."""

    type: Literal["function_call_output"]
    call_id: str
    output: str | InputParts

    def message(self) -> Message:
        return Message(role="tool", content=_content(self.output), tool_call_id=self.call_id)


class TextOptions(RequestObject):
    format: ResponsesFormat | None = None


def _item_type(item: object) -> str:
    """The type of an item as its tag; brackets, as the tag is no field in the path of an error."""
    if isinstance(item, dict):
        return f"[{item.get('type') or 'message'}]"
    return f"[{getattr(item, 'type', None)}]"


InputItem: TypeAlias = Annotated[
    Annotated[InputMessage, Tag("[message]")]
    | Annotated[InputCall, Tag("[function_call]")]
    | Annotated[InputCallOutput, Tag("[function_call_output]")],
    Discriminator(_item_type),
]


class ResponsesRequest(GenerationBody):
    fields: ClassVar[FieldTable] = RESPONSES

    input: str | Annotated[list[InputItem], Field(min_length=1, max_length=MAX_MESSAGES)]
    instructions: str | None = None
    max_output_tokens: WholeNumber | None = Field(None, ge=1)
    include: list[Literal["message.output_text.logprobs"]] = Field([])
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=MAX_LOGPROBS)
    text: TextOptions = TextOptions()
    metadata: dict[str, str] = Field({}, max_length=_MAX_METADATA)
    tools: list[FunctionTool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoiceField | None = None
    parallel_tool_calls: StrictBool = True

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, top_logprobs: int | None, info: ValidationInfo) -> int | None:
        if top_logprobs and not info.data.get("include"):
            raise ValueError(f'{top_logprobs} alternatives need include: ["message.output_text.logprobs"]')
        return top_logprobs

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.include else None

    def grammars(self) -> Iterator[FieldGrammar]:
        if self.text.format is not None:
            yield from self.text.format.grammars("text.format")
        yield from super().grammars()

    @property
    def messages(self) -> list[Message]:
        """The conversation as chat completions have it."""
        return list(self._messages())

    @property
    def media(self) -> list[tuple[str, MediaContent]]:
        """Each image of the conversation, in its order, with its place in the request."""
        return [
            (f"input.{number}.{name}.{index}", part)
            for number, item in enumerate(self.input if isinstance(self.input, list) else [])
            for name in ("content", "output")
            if isinstance(parts := getattr(item, name, None), list)
            for index, part in enumerate(parts)
            if isinstance(part, InputImage)
        ]

    @property
    def offered_tools(self) -> OfferedTools | None:
        """The tools that the answer may call.

        Raises:
            BadRequest: see `offered_tools`.
        """
        return offered_tools(self.tools, self.tool_choice, self.parallel_tool_calls, field="tools.{}")

    def _messages(self) -> Iterator[Message]:
        given = list(_given(self.input)) if isinstance(self.input, list) else [Message(role="user", content=self.input)]
        if self.instructions is not None:
            # One system message, as templates have no place for a second.
            first = given.pop(0) if given[0].role in ("system", "developer") else None
            yield Message(role="system", content=_joined(self.instructions, first))
        yield from given


def _content(given: str | Sequence[InputText | InputImage]) -> str | list[ContentPart]:
    """The content of a message as chat completions have it."""
    return given if isinstance(given, str) else [_part(each) for each in given]


def _part(given: InputText | InputImage) -> ContentPart:
    if isinstance(given, InputText):
        return TextPart(type="text", text=given.text)
    # For the chat template, which gets no more of an image than that there is one; `media` has the options.
    return ImagePart(type="image_url", image_url=ImageUrl(url=given.image_url))


def _given(items: Sequence[InputItem]) -> Iterator[Message]:
    """The items as messages: calls are those of the assistant's message in front of them."""
    calling: Message | None = None
    calls: list[ToolCall] = []
    for item in items:
        if isinstance(item, InputCall):
            calling = calling or Message(role="assistant")
            calls.append(item.call())
            continue
        if calling is not None:
            yield calling.model_copy(update={"tool_calls": calls})
            calling, calls = None, []
        message = item.message()
        if message.role == "assistant":
            calling = message
        else:
            yield message
    if calling is not None:
        yield calling.model_copy(update={"tool_calls": calls})


def _joined(instructions: str, system: Message | None) -> str | list[ContentPart]:
    if system is None:
        return instructions
    if isinstance(system.content, str):
        return f"{instructions}\n\n{system.content}"
    return [TextPart(type="text", text=f"{instructions}\n\n"), *(system.content or [])]
