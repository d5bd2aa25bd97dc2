"""The honoured fields of OpenAI's requests, with their types and ranges. All others are in `request_fields.py`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StrictBool,
    StrictInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from vitrine_vlm.llm_worker.frontend.field_rules import FieldTable
from vitrine_vlm.llm_worker.frontend.request_fields import CHAT, COMPLETION, DETOKENIZE, TOKENIZE

_MAX_TOP_LOGPROBS = 20
_MAX_TOKEN_ID = 2**31 - 1


def _whole_number(value: object) -> object:
    """Takes 16.0 for 16: some languages write no integers."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Strict: "5" and true are no numbers, and 1 is not true.
WholeNumber = Annotated[StrictInt, BeforeValidator(_whole_number)]
Number = Annotated[float, Field(strict=True)]
TokenId = Annotated[StrictInt, Field(ge=0, le=_MAX_TOKEN_ID)]


class RequestObject(BaseModel):
    """An object in a request's body."""

    model_config = ConfigDict(extra="ignore", frozen=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: object) -> object:
        """Drops fields that are null, as some clients write fields that were not set."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}


class TextPart(RequestObject):
    type: Literal["text"]
    text: str


class MediaUrl(RequestObject):
    url: str


class ImagePart(RequestObject):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoUrl(MediaUrl):
    """fps: frames sampled per second, an extension of OpenAI's fields; the checkpoint's own rate where left out."""

    fps: Number | None = Field(None, gt=0)


class VideoPart(RequestObject):
    type: Literal["video_url"]
    video_url: VideoUrl


MediaPart = Annotated[ImagePart | VideoPart, Field(discriminator="type")]
ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(RequestObject):
    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None


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
    stop: str | list[str] | None = None
    stop_token_ids: list[TokenId] = []
    ignore_eos: StrictBool = False
    stream: StrictBool = False

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())


class CompletionBody(GenerationBody):
    """The fields that chat and plain completions share."""

    max_tokens: WholeNumber | None = Field(None, ge=1)
    stream_options: StreamOptions = StreamOptions()
    return_token_ids: StrictBool = False
    return_tokens_as_token_ids: StrictBool = False


class ChatRequest(CompletionBody):
    fields: ClassVar[FieldTable] = CHAT

    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: WholeNumber | None = Field(None, ge=1)
    logprobs: StrictBool = False
    top_logprobs: WholeNumber | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)

    @field_validator("top_logprobs")
    @classmethod
    def _check_top_logprobs(cls, top_logprobs: int | None, info: ValidationInfo) -> int | None:
        if top_logprobs and not info.data.get("logprobs"):
            raise ValueError(f"{top_logprobs} alternatives need logprobs: true")
        return top_logprobs

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(CompletionBody):
    """prompt: text or token ids. media: images and videos of its placeholders, as in a chat message; an extension."""

    fields: ClassVar[FieldTable] = COMPLETION

    # Strict, so that "1" is text and not the token 1.
    prompt: str | list[TokenId]
    media: list[MediaPart] = []
    logprobs: WholeNumber | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)

    @field_validator("prompt", mode="before")
    @classmethod
    def _unwrap_single_prompt(cls, prompt: object) -> object:
        """Unwraps a list of one prompt: OpenAI accepts lists of prompts, and some clients always send one."""
        if not isinstance(prompt, list) or not any(isinstance(each, str | list) for each in prompt):
            return prompt
        if len(prompt) > 1:
            raise ValueError(f"{len(prompt)} prompts in one request: send each in a request of its own")
        return prompt[0]

    @property
    def num_logprobs(self) -> int | None:
        return self.logprobs


class TokenizeRequest(RequestBody):
    """One of prompt and messages."""

    fields: ClassVar[FieldTable] = TOKENIZE

    model: str | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Field(min_length=1)] | None = Field(None, validate_default=True)
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
