"""From the body of a request to its fields, or to an error that names the field that is wrong."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from contextvars import copy_context
from functools import partial
from typing import Any, TypeAlias, TypeVar

from aiohttp import web
from pydantic import ValidationError

from vitrine_vlm.errors import BadRequest
from vitrine_vlm.llm_worker.frontend import body_process
from vitrine_vlm.llm_worker.frontend.field_rules import apply_rules
from vitrine_vlm.llm_worker.frontend.json_body import MANY_VALUES, json_object, with_media
from vitrine_vlm.llm_worker.frontend.openai_types import RequestBody
from vitrine_vlm.service_runtime.body_process import Kept
from vitrine_vlm.service_runtime.body_reader import BodyReader
from vitrine_vlm.service_runtime.http_requests import json_body
from vitrine_vlm.service_runtime.json_limits import num_values
from vitrine_vlm.service_runtime.json_types import problem_of

_PART_TYPES = ("text", "image_url", "video_url", "video", "input_text", "output_text", "input_image")
# A body with more bytes or values may take longer than other requests and probes should wait.
_SMALL_BODY_BYTES = 256 * 1024
_FEW_VALUES = 1000
# A larger one takes tenths of a second, and so does one of more values; seconds where they are a tool's schema.
_LARGE_BODY_BYTES = 4 * 1024 * 1024
_SIZE = web.RequestKey("bytes and values of the body, without media that were read", tuple[int, int])
_BODY_READER = web.AppKey("reader of large bodies", BodyReader)
_LARGE_BODIES_THREAD = web.AppKey("thread of large bodies", ThreadPoolExecutor)
_TEMPLATE_THREADS = web.AppKey("threads of requests' own templates", ThreadPoolExecutor)
_NUM_TEMPLATE_THREADS = 2

# Is called with the names of a request's fields that change nothing: informative ones, unknown ones.
Count: TypeAlias = Callable[[Iterable[str], Iterable[str]], None]
RequestT = TypeVar("RequestT", bound=RequestBody)
ResultT = TypeVar("ResultT")


async def read_request(kind: type[RequestT], http: web.Request, count: Count) -> RequestT:
    """Reads and parses a request's body, which must be declared to be JSON; see `parse_request`.

    Raises:
        BadRequest: the body is declared to be something else.
    """
    body = await json_body(http)
    if not isinstance(body, bytes):
        values, http[_SIZE] = await http.app[_BODY_READER].read(http, body, {}, _values_and_size)
        return await with_body(http, partial(request_of, kind, values, count))
    counted = partial(num_values, body, MANY_VALUES)
    http[_SIZE] = len(body), counted() if len(body) <= _SMALL_BODY_BYTES else await asyncio.to_thread(counted)
    return await with_body(http, partial(parse_request, kind, body, count))


def _values_and_size(found: dict[str, Any], kept: Kept) -> tuple[dict[str, Any], tuple[int, int]]:
    return with_media(found, kept), (found["nbytes"], found["num_values"])


async def with_body(http: web.Request, work: Callable[[], ResultT]) -> ResultT:
    """Runs work that takes longer the larger the request's body is, which `read_request` has read.

    That of one that is not small runs on a thread, so that other requests and probes are answered meanwhile, and large
    bodies have one thread together, as each thread that computes takes a part of the interpreter.
    """
    nbytes, num = http[_SIZE]
    if nbytes <= _SMALL_BODY_BYTES and num <= _FEW_VALUES:
        return work()
    if nbytes <= _LARGE_BODY_BYTES and num <= MANY_VALUES:
        return await asyncio.to_thread(work)
    thread = http.app[_LARGE_BODIES_THREAD]
    return await asyncio.get_running_loop().run_in_executor(thread, copy_context().run, work)


async def with_template(http: web.Request, work: Callable[[], ResultT]) -> ResultT:
    """Runs work that renders the request's own template, which takes as long as a template may: on its own threads."""
    threads = http.app[_TEMPLATE_THREADS]
    return await asyncio.get_running_loop().run_in_executor(threads, copy_context().run, work)


def add_body_threads(application: web.Application) -> None:
    """Adds what `read_request`, `with_body` and `with_template` need to an application, which ends it."""
    large_bodies = ThreadPoolExecutor(1, thread_name_prefix="large bodies")
    templates = ThreadPoolExecutor(_NUM_TEMPLATE_THREADS, thread_name_prefix="request templates")

    async def end(application: web.Application) -> None:
        for threads in (large_bodies, templates):
            threads.shutdown(wait=False, cancel_futures=True)

    application[_LARGE_BODIES_THREAD], application[_TEMPLATE_THREADS] = large_bodies, templates
    application.on_cleanup.append(end)
    application[_BODY_READER] = BodyReader(body_process.__name__)
    application[_BODY_READER].end_with(application)


def parse_request(kind: type[RequestT], body: bytes, count: Count = lambda informative, unknown: None) -> RequestT:
    """Parses a request's body.

    Args:
        count: called with the fields that change nothing.

    Raises:
        BadRequest: the body is no JSON object or too large a one, or a field is missing, out of range or not supported.
    """
    return request_of(kind, json_object(body), count)


def request_of(kind: type[RequestT], values: dict[str, Any], count: Count) -> RequestT:
    """A request of its body's values, see `parse_request`."""
    try:
        request = kind.model_validate(values)
    except ValidationError as error:
        # Where a field may be one of several types each has an error: the deepest one says best what is wrong, and of
        # these one that is not about the type.
        errors = error.errors(include_url=False, include_input=False)
        first = max(errors, key=lambda each: (len(each["loc"]), not each["type"].endswith("_type")))
        param = _field_path(first["loc"])
        raise BadRequest(f"{param}: {problem_of(first)}", param) from None
    unused = apply_rules(kind.fields, values)
    count(unused.informative, unused.unknown)
    return request


def _field_path(loc: tuple[int | str, ...]) -> str:
    """The field's path in the body, without the types that pydantic tried, which stand between the names."""
    names: list[str] = []
    for previous, each in zip((None, *loc), loc, strict=False):
        is_part_type = isinstance(previous, int) and each in _PART_TYPES
        if not is_part_type and each != "str" and "[" not in str(each):
            names.append(str(each))
    return ".".join(names)
