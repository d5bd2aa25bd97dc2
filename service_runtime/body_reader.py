"""Has large bodies read by a process of its own, see `body_process`."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextvars import copy_context
from typing import Any, TypeVar

from aiohttp import web
from pydantic_core import from_json

from vitrine_vlm.errors import BadRequest, error_from_code
from vitrine_vlm.service_runtime.body_process import MAX_CPU_S, Kept
from vitrine_vlm.service_runtime.http_requests import reading
from vitrine_vlm.service_runtime.limited_processes import LimitedProcesses, TookTooMuch
from vitrine_vlm.service_runtime.memory_file import MemoryFile

ResultT = TypeVar("ResultT")


class BodyReader:
    """Reads one body after the other: several at once would take the cores from what serves other requests.

    Args:
        module: whose process it is, see `body_process.answer_bodies`; it is started with the first body.
    """

    def __init__(self, module: str) -> None:
        self._processes = LimitedProcesses(module, MAX_CPU_S)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="body process")

    def end_with(self, application: web.Application) -> None:
        """Ends the process with the application, also in the middle of a body, which nothing waits for then."""

        async def end(application: web.Application) -> None:
            self._thread.shutdown(wait=False, cancel_futures=True)
            await asyncio.to_thread(self._processes.kill)

        application.on_cleanup.append(end)

    async def read(
        self, http: web.Request, body: MemoryFile, arguments: dict[str, Any], use: Callable[[Any, Kept], ResultT]
    ) -> ResultT:
        """Returns what `use` makes of what the process has found, on a thread.

        Args:
            http: the request whose body it is.
            body: closed at the end, on the thread: hundreds of megabytes take a while to be freed.
            arguments: for the process's module, in JSON's types.

        Raises:
            VitrineError: what the process has raised, or the service is ending, see `HttpPort.answered`.
            BadRequest: it took more time or memory than it may.
        """
        job: Future[ResultT] = self._thread.submit(copy_context().run, self._read, body, json.dumps(arguments), use)
        try:
            with reading(http):
                return await asyncio.wrap_future(job)
        except BaseException:
            if job.cancel():  # a body that waits for others counts for nothing any more, and so takes no memory
                asyncio.get_running_loop().run_in_executor(None, body.close)
            raise

    def _read(self, body: MemoryFile, arguments: str, use: Callable[[Any, Kept], ResultT]) -> ResultT:
        with body, MemoryFile() as kept:
            try:
                answer = json.loads(self._processes.ask(arguments, (body.fd, kept.fd)))
            except TookTooMuch as error:
                limit = f"more than {MAX_CPU_S:g} s" if error.is_time else "too much memory"
                raise BadRequest(f"reading the body of {body.nbytes} bytes takes {limit}: send less at once") from error
            if "fault" in answer:
                raise RuntimeError(f"the process that reads bodies failed: {answer['fault']}")
            if "error" in answer:
                named = error_from_code(answer["error"], answer["message"])
                named.param = answer["param"]
                raise named
            return use(from_json(kept.read(*answer["found"])), kept.read)
