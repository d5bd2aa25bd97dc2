"""Calls whose request comes in pieces: in what time, and what is done with the rest of one that is refused."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, NoReturn, TypeVar

import grpc

from vitrine_vlm.embedding_transport.wire.unread_replies import BoundedContext, UnreadReplies
from vitrine_vlm.service_runtime.grpc_requests import behaviour_of
from vitrine_vlm.service_runtime.port_limits import LEAST_BYTES_PER_S

MethodT = TypeVar("MethodT", bound=Callable[..., Any])
_DECLARED = "max_piece_message_nbytes"


def takes_pieces(max_message_nbytes: int) -> Callable[[MethodT], MethodT]:
    """Declares that a method, a coroutine that writes, takes its request in messages of up to so many bytes."""

    def declare(method: MethodT) -> MethodT:
        setattr(method, _DECLARED, max_message_nbytes)
        return method

    return declare


def max_piece_message_nbytes(handler: grpc.RpcMethodHandler[Any, Any]) -> int | None:
    """Returns what its method has declared with `takes_pieces`; None for a method of another kind."""
    declared: int | None = getattr(behaviour_of(handler), _DECLARED, None)
    return declared


class PiecesContext(BoundedContext):
    """The context of a call in pieces. The rest of a request is read before the call ends with an error: where a client
    writes meanwhile its gRPC reports that write, which fails, in place of the error.

    Args:
        timeout_s: of the port's clients.
        discard_rest: reads what the peer still sends, within bounds.
    """

    def __init__(
        self,
        context: grpc.aio.ServicerContext[Any, Any],
        peer: str,
        replies: UnreadReplies,
        timeout_s: float,
        discard_rest: Callable[[], Awaitable[None]],
    ) -> None:
        super().__init__(context, peer, replies)
        self._timeout_s = timeout_s
        self._discard_rest = discard_rest
        self._waited_s = 0.0
        self._nbytes = 0
        # No read is pending, and none has found the end of the request.
        self._can_read = True

    @property
    def is_slow(self) -> bool:
        """Whether the request was waited for longer than it may take: as for HTTP bodies, other requests that are read
        first do not count."""
        return self._waited_s > self._timeout_s + self._nbytes / LEAST_BYTES_PER_S

    async def read(self) -> Any:
        loop = asyncio.get_running_loop()
        began = loop.time()
        self._can_read = False  # gRPC still reads if this is cancelled
        raw = await self._context.read()
        if isinstance(raw, bytes):
            self._can_read = True
            self._nbytes += len(raw)
            self._waited_s += loop.time() - began
        return raw

    async def abort(self, code: grpc.StatusCode, details: str = "", trailing_metadata: Any = ()) -> NoReturn:
        """
        Raises:
            CancelledError: the peer has disconnected meanwhile.
        """
        if self._can_read and not self.is_slow:
            await self._discard_rest()
            if self._context.done():
                raise asyncio.CancelledError("the peer is gone")
        await self._context.abort(code, details, trailing_metadata)
