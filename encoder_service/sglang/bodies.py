"""The JSON bodies that SGLang's language servers send, checked.

Source: SGLang 0.5.17 to 0.5.23, `MMReceiverHTTP.encode` and `WaitingZmqRequest.send_encode_request`.
"""

from __future__ import annotations

from typing import Annotated, Literal, TypeVar

import aiohttp
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from vitrine_vlm.encoder_service.sglang.frames import Modality
from vitrine_vlm.errors import BadRequest
from vitrine_vlm.service_runtime.byte_budget import Reserve
from vitrine_vlm.service_runtime.http_requests import body_pieces

_MAX_SHOWN = 500
_MAX_PARTS = 4096
_MAX_RECEIVERS = 1024

Host = Annotated[str, Field(min_length=1, max_length=255)]
Port = Annotated[int, Field(ge=1, le=65535)]
ReqId = Annotated[str, Field(min_length=1, max_length=512)]


class ItemBody(BaseModel):
    """One image or video with options. What is not named here is in `model_extra`."""

    model_config = ConfigDict(strict=True, frozen=True, extra="allow")

    url: str
    detail: Literal["auto", "low", "high"] | None = None
    fps: float | None = Field(None, gt=0, allow_inf_nan=False)
    content_hash: str | None = Field(None, pattern=r"^sha256:[0-9A-Fa-f]{64}$")


class EncodeBody(BaseModel):
    """The body of /encode. Keys for SGLang's own encoders (hashes, encoder_idx, time_stats_json) change no rows."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    req_id: ReqId
    num_parts: int = Field(ge=1, le=_MAX_PARTS)
    part_idx: int = Field(ge=0)
    modality: Modality
    mm_items: list[str | ItemBody] = Field(min_length=1)
    prefill_host: Host | None = None
    embedding_port: Port | Annotated[list[Port], Field(min_length=1, max_length=_MAX_RECEIVERS)] | None = None


class ReceiverBody(BaseModel):
    """The body of /scheduler_receive_url: one of `receive_count` receivers of a part."""

    model_config = ConfigDict(strict=True, frozen=True, extra="ignore")

    req_id: ReqId
    receive_count: int = Field(ge=1, le=_MAX_RECEIVERS)
    receive_url: str = Field(min_length=1, max_length=300)


BodyT = TypeVar("BodyT", bound=BaseModel)


async def read_body(http: web.Request, kind: type[BodyT], max_nbytes: int, reserve: Reserve) -> BodyT:
    """Reads a request's body.

    Args:
        reserve: called with the number of bytes of each piece that arrives; what it raises ends the reading.

    Raises:
        BadRequest: it is no JSON, too large, or has values of other types or out of range.
    """
    # Browsers let a page of another origin send this type only after a preflight request, which is refused here.
    if http.content_type != "application/json":
        raise BadRequest(f"the content type is {http.content_type}: send JSON as content-type: application/json")
    body = bytearray()
    try:
        async for piece in body_pieces(http):
            if len(body) + len(piece) > max_nbytes:
                raise BadRequest(f"the body has more than {max_nbytes} bytes: send fewer items, or URLs")
            reserve(len(piece))
            body += piece
    except (aiohttp.ClientError, web.RequestPayloadError, ConnectionError) as error:
        raise BadRequest(f"the body broke off after {len(body)} bytes") from error
    return parse_body(kind, body)


def parse_body(kind: type[BodyT], body: bytes | bytearray) -> BodyT:
    """Parses a request's body.

    Raises:
        BadRequest: it is no JSON, or has values of other types or out of range.
    """
    try:
        return kind.model_validate_json(body)
    except ValidationError as error:
        raise BadRequest(_shown(error)) from None  # the error has the values, which may be large


def split_receive_url(receive_url: str) -> tuple[str, int]:
    """Returns host and port of "host:port" or "[IPv6 address]:port".

    Raises:
        BadRequest: it is neither.
    """
    host, _, port = receive_url.rpartition(":")
    if host.startswith("[") and host.endswith("]"):
        host = host[1:-1]
    elif ":" in host:
        host = ""
    if not host or not (port.isascii() and port.isdecimal()) or not 1 <= int(port) <= 65535:
        raise BadRequest("receive_url must be host:port, with an IPv6 address in brackets")
    return host, int(port)


def _shown(error: ValidationError) -> str:
    problems = error.errors(include_url=False, include_context=False, include_input=False)
    shown = "; ".join(f"{'.'.join(map(str, each['loc'])) or 'the body'}: {each['msg']}" for each in problems)
    return shown[:_MAX_SHOWN]
