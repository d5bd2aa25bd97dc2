"""Requests of the OpenAI API, as far as they are supported. Unknown fields are ignored, as OpenAI's servers do."""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, StrictInt, ValidationError, field_validator, model_validator

from vitrine_vlm.errors import BadRequest

_MAX_TOP_LOGPROBS = 20
_PART_TYPES = ("text", "image_url", "video_url")


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class TextPart(_Part):
    type: Literal["text"]
    text: str


class MediaUrl(_Part):
    url: str


class ImagePart(_Part):
    type: Literal["image_url"]
    image_url: MediaUrl


class VideoUrl(MediaUrl):
    """fps: frames sampled per second, an extension of OpenAI's fields; the checkpoint's own rate where left out."""

    fps: float | None = Field(None, gt=0)


class VideoPart(_Part):
    type: Literal["video_url"]
    video_url: VideoUrl


MediaPart = Annotated[ImagePart | VideoPart, Field(discriminator="type")]
ContentPart = Annotated[TextPart | ImagePart | VideoPart, Field(discriminator="type")]


class Message(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: str | list[ContentPart] | None = None


class StreamOptions(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)

    include_usage: bool | None = False


class _Request(BaseModel):
    """The fields that chat and plain completions share. top_k and stop_token_ids are extensions, as elsewhere."""

    model_config = ConfigDict(extra="ignore", frozen=True)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: int | None = Field(None, ge=-1)
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] = []
    ignore_eos: bool = False
    n: Literal[1] | None = None
    stream: bool | None = False
    stream_options: StreamOptions | None = None
    return_token_ids: bool = False

    @model_validator(mode="before")
    @classmethod
    def _drop_nulls(cls, fields: object) -> object:
        """Drops fields that are null, as some clients write fields that were not set."""
        if not isinstance(fields, dict):
            return fields
        return {name: value for name, value in fields.items() if value is not None}

    @property
    def stop_strings(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatRequest(_Request):
    messages: list[Message] = Field(min_length=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool | None = False
    top_logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)

    @property
    def num_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Request):
    """prompt: text or token ids. media: images and videos of its placeholders, as in a chat message; an extension."""

    # Strict, so that "1" is text and not the token 1.
    prompt: str | list[StrictInt]
    media: list[MediaPart] = []
    logprobs: int | None = Field(None, ge=0, le=_MAX_TOP_LOGPROBS)

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


RequestT = TypeVar("RequestT", ChatRequest, CompletionRequest)


class InvalidField(BadRequest):
    """A field that is missing or out of range. param: its name, as in OpenAI's errors."""

    param: str

    def __init__(self, message: str, param: str) -> None:
        super().__init__(message)
        self.param = param


def parse_request(kind: type[RequestT], body: bytes) -> RequestT:
    """Parses a request's body.

    Raises:
        BadRequest: the body is not JSON, or a field is missing or out of range.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        # Where a field may be one of several types each has an error: the deepest one says best what is wrong.
        first = max(error.errors(include_url=False, include_input=False), key=lambda each: len(each["loc"]))
        param, message = _field_path(first["loc"]), first["msg"].removeprefix("Value error, ")
        if not param:
            raise BadRequest(f"the body is no JSON object: {message}") from None
        raise InvalidField(f"{param}: {message}", param) from None


def _field_path(loc: tuple[int | str, ...]) -> str:
    """The field's path in the body, without the types that pydantic tried, which stand between the names."""
    names: list[str] = []
    for previous, each in zip((None, *loc), loc, strict=False):
        is_part_type = isinstance(previous, int) and each in _PART_TYPES
        if not is_part_type and each != "str" and "[" not in str(each):
            names.append(str(each))
    return ".".join(names)
