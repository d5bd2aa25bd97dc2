"""The honoured fields of OpenAI's requests, with their types and ranges. All others are in `request_fields.py`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal, Self, cast

from pydantic import Field, StrictBool, StrictInt, ValidationInfo, field_validator, model_validator

from vitrine_vlm.embedding_transport.clients.media_options import MediaIoKwargs, ProcessorKwargs, RequestOptions
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.engine.sampling_checks import MAX_BAD_WORDS, MAX_LOGPROBS
from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable
from vitrine_vlm.llm_worker.frontend.grammar_types import (
    Choices,
    FieldGrammar,
    ResponseFormat,
    Schema,
    StructuredOutputs,
    grammars_of,
)
from vitrine_vlm.llm_worker.frontend.media_parts import FramesPart, ImagePart, MediaPart, VideoPart
from vitrine_vlm.llm_worker.frontend.request_fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE
from vitrine_vlm.llm_worker.frontend.tool_calls import OfferedTools, offered_tools
from vitrine_vlm.llm_worker.frontend.tool_types import (
    MAX_TOOLS,
    CalledFunction,
    FunctionDefinition,
    Tool,
    ToolCall,
    ToolChoiceField,
)
from vitrine_vlm.llm_worker.generation.several_answers import MAX_ANSWERS
from vitrine_vlm.llm_worker.generation.stop_strings import MAX_STOP_STRINGS
from vitrine_vlm.service_runtime.json_types import Number as Number
from vitrine_vlm.service_runtime.json_types import RequestObject as RequestObject
from vitrine_vlm.service_runtime.json_types import WholeNumber as WholeNumber
from vitrine_vlm.service_runtime.tenants import MAX_SALT_LENGTH, CacheScope, current_tenant

_MAX_TOKEN_ID = 2**31 - 1
_MAX_TEMPLATE_LENGTH = 64 * 1024
# OpenAI's own limit is 2048 messages.
MAX_MESSAGES = 8192
MAX_PARTS = 8192
_MAX_DOCUMENTS = 8192


TokenId = Annotated[StrictInt, Field(ge=0, le=_MAX_TOKEN_ID)]


class TextPart(RequestObject):
    type: Literal["text"]
    text: str


ContentPart = Annotated[TextPart | ImagePart | VideoPart | FramesPart, Field(discriminator="type")]
Messages = Annotated[list["Message"], Field(min_length=1, max_length=MAX_MESSAGES)]


class Message(RequestObject):
    """tool_calls: of the assistant; function_call: the older form of one. The role `function` is that of `tool`."""

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | Annotated[list[ContentPart], Field(max_length=MAX_PARTS)] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] = Field([])
    tool_call_id: str | None = None
    function_call: CalledFunction | None = None

    @model_validator(mode="after")
    def _check_calls(self) -> Self:
        if self.role != "assistant" and self.calls:
            raise ValueError(f"only messages of the assistant have tool calls, this is one of {self.role}")
        if self.tool_calls and self.function_call is not None:
            raise ValueError("function_call is the older form of tool_calls: send either")
        return self

    @property
    def calls(self) -> list[ToolCall]:
        return self.tool_calls or ([ToolCall(function=self.function_call)] if self.function_call else [])


class StreamOptions(RequestObject):
    include_usage: StrictBool = False
    continuous_usage_stats: StrictBool = False


class RequestBody(RequestObject):
    """fields: what becomes of each field of the route's body."""

    fields: ClassVar[FieldTable]


class GenerationBody(RequestBody):
    """The fields that all routes to text share. top_k and stop_token_ids are extensions, as elsewhere."""

    model: str
    temperature: Number | None = Field(None, ge=0, le=2)
    top_p: Number | None = Field(None, gt=0, le=1)
    top_k: WholeNumber | None = Field(None, ge=-1)
    seed: WholeNumber | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOP_STRINGS)] | None = None
    stop_token_ids: list[TokenId] = Field([])
    ignore_eos: StrictBool = False
    # Their ranges: engine/sampling_checks.py.
    min_p: Number | None = None
    min_tokens: WholeNumber = 0
    presence_penalty: Number = 0.0
    frequency_penalty: Number = 0.0
    repetition_penalty: Number | None = None
    logit_bias: dict[int, Number] = Field({})
    bad_words: list[str] = Field([], max_length=MAX_BAD_WORDS)
    allowed_token_ids: list[TokenId] | None = None
    include_stop_str_in_output: StrictBool = False
    no_stop_trim: StrictBool = False
    skip_special_tokens: StrictBool = True
    truncate_prompt_tokens: WholeNumber | None = None
    mm_processor_kwargs: ProcessorKwargs = ProcessorKwargs()
    media_io_kwargs: MediaIoKwargs = MediaIoKwargs()
    structured_outputs: StructuredOutputs = StructuredOutputs()
    cache_salt: str | None = Field(None, min_length=1, max_length=MAX_SALT_LENGTH)
    stream: StrictBool = False

    def grammars(self) -> Iterator[FieldGrammar]:
        """What the answer must look like, by every field that says so."""
        yield from self.structured_outputs.grammars("structured_outputs")

    @property
    def num_logprobs(self) -> int | None:
        """Alternatives of each token, 0 for the token's own log-probability only; None for none."""
        raise NotImplementedError

    @property
    def num_prompt_logprobs(self) -> int | None:
        """As `num_logprobs`, of the prompt."""
        return None

    @property
    def media_options(self) -> RequestOptions:
        return RequestOptions(self.mm_processor_kwargs, self.media_io_kwargs)

    @property
    def cache_scope(self) -> CacheScope:
        return CacheScope(current_tenant(), self.cache_salt or "")

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(GenerationBody):
    """The fields that chat and plain completions share."""

    prompt_logprobs: WholeNumber | None = Field(None, ge=0, le=MAX_LOGPROBS)
    n: WholeNumber = Field(1, ge=1)
    best_of: WholeNumber = Field(0, ge=0)
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: StrictBool = False
    return_tokens_as_token_ids: StrictBool = False
    response_format: ResponseFormat | None = None
    guided_json: Schema | None = None
    guided_regex: str | None = None
    guided_choice: Choices | None = None
    guided_grammar: str | None = None
    json_schema: Schema | None = None
    regex: str | None = None
    ebnf: str | None = None

    def grammars(self) -> Iterator[FieldGrammar]:
        if self.response_format is not None:
            yield from self.response_format.grammars("response_format")
        yield from super().grammars()
        names = ("guided_json", "guided_regex", "guided_choice", "guided_grammar", "json_schema", "regex", "ebnf")
        yield from grammars_of({name: getattr(self, name) for name in names})

    @property
    def num_prompt_logprobs(self) -> int | None:
        return self.prompt_logprobs


class TemplateBody(RequestBody):
    """The fields of what the chat template writes, beside messages."""

    tools: list[Tool] = Field([], max_length=MAX_TOOLS)
    tool_choice: ToolChoiceField | None = None
    documents: list[dict[str, Any]] = Field([], max_length=_MAX_DOCUMENTS)
    chat_template: str | None = Field(None, max_length=_MAX_TEMPLATE_LENGTH)
    chat_template_kwargs: dict[str, Any] = Field({})
    reasoning_effort: str | None = None
    add_generation_prompt: StrictBool | None = None
    continue_final_message: StrictBool = False

    @field_validator("continue_final_message")
    @classmethod
    def _check_end(cls, continue_final_message: bool, info: ValidationInfo) -> bool:
        if continue_final_message and info.data.get("add_generation_prompt"):
            raise ValueError("a prompt ends inside the last message or behind it: not with add_generation_prompt: true")
        return continue_final_message

    @property
    def offered_tools(self) -> OfferedTools | None:
        """The tools that the answer may call.

        Raises:
            BadRequest: see `offered_tools`.
        """
        return offered_tools([each.function for each in self.tools], self.tool_choice)


class ChatRequest(CompletionBody, TemplateBody):
    fields: ClassVar[FieldTable] = CHAT

    messages: Messages
    parallel_tool_calls: StrictBool = True
    functions: list[FunctionDefinition] = Field([], max_length=MAX_TOOLS)
    function_call: ToolChoiceField | None = None
    max_tokens: WholeNumber | None = Field(None, ge=1)
    max_completion_tokens: WholeNumber | None = Field(None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, top_logprobs: int | None, info: ValidationInfo) -> int | None:
        if top_logprobs and not info.data.get("logprobs"):
            raise ValueError(f"{top_logprobs} alternatives need logprobs: true")
        return top_logprobs

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    @property
    def offered_tools(self) -> OfferedTools | None:
        if self.functions or self.function_call is not None:
            older, newer = ("functions", "tools") if self.functions else ("function_call", "tool_choice")
            if self.tools:
                raise BadRequest(f"{older}: the older form of {newer}: send either", older)
            if self.functions and self.tool_choice is not None and self.tool_choice.mode != "auto":
                raise BadRequest("tool_choice: functions have function_call instead", "tool_choice")
            return offered_tools(self.functions, self.function_call, legacy=True, field="functions.{}")
        return offered_tools([each.function for each in self.tools], self.tool_choice, self.parallel_tool_calls)


class CompletionRequest(CompletionBody):
    """prompt: text or token ids, one or several.

    media: images and videos of the only prompt's placeholders, as in a chat message; an extension.
    """

    fields: ClassVar[FieldTable] = COMPLETION

    # Strict, so that "1" is text and not the token 1.
    prompt: str | list[TokenId] | list[str] | list[list[TokenId]]
    media: list[MediaPart] = Field([])
    logprobs: WholeNumber | None = Field(None, ge=0, le=MAX_LOGPROBS)
    echo: StrictBool = False
    max_tokens: WholeNumber | None = Field(None, ge=0)

    @field_validator("max_tokens")
    @classmethod
    def _check_max_tokens(cls, max_tokens: int | None, info: ValidationInfo) -> int | None:
        if max_tokens == 0 and not info.data.get("echo"):
            raise ValueError("0 needs echo: true, and must be at least 1 without it")
        return max_tokens

    @property
    def num_prompt_logprobs(self) -> int | None:
        numbers = (self.prompt_logprobs, self.logprobs if self.echo else None)
        return max((each for each in numbers if each is not None), default=None)

    @field_validator("prompt")
    @classmethod
    def _check_number(cls, prompt: str | list[Any]) -> str | list[Any]:
        if isinstance(prompt, list) and not (prompt and isinstance(prompt[0], int)) and len(prompt) > MAX_ANSWERS:
            raise ValueError(f"{len(prompt)} prompts in one request: at most {MAX_ANSWERS} are accepted")
        return prompt

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt as text or token ids."""
        if isinstance(self.prompt, str) or not self.prompt or isinstance(self.prompt[0], int):
            return [cast(str | list[int], self.prompt)]
        return cast(list[str | list[int]], self.prompt)

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(TemplateBody):
    """One of prompt and messages, which alone have a template."""

    fields: ClassVar[FieldTable] = TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = Field(None, validate_default=True)
    return_token_strs: StrictBool = False

    @field_validator("messages")
    @classmethod
    def _check_one_of_both(cls, messages: list[Message] | None, info: ValidationInfo) -> list[Message] | None:
        if (messages is None) == (info.data.get("prompt") is None):
            raise ValueError("send either prompt or messages")
        return messages


class DetokenizeRequest(RequestBody):
    fields: ClassVar[FieldTable] = DETOKENIZE

    model: str | None = None
    tokens: list[TokenId]
    skip_special_tokens: StrictBool = False
