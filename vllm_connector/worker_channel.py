"""A worker's end of the worker channel: a thread that answers the scheduler's process, one request after the other."""

from __future__ import annotations

import logging
import socket
import threading
import time
from pathlib import Path

import torch
from pydantic import BaseModel

from vitrine_vlm.errors import InternalError, TransportUnavailable, VitrineError
from vitrine_vlm.service_runtime.backoff import Backoff
from vitrine_vlm.vllm_connector.channel_path import check_private
from vitrine_vlm.vllm_connector.messages import (
    LENGTHS,
    Answer,
    Discard,
    Hello,
    Land,
    LandBytes,
    Map,
    Request,
    Unmap,
    pack_frame,
    unpack_lengths,
)
from vitrine_vlm.vllm_connector.row_landing import RowLanding

_FIRST_BACKOFF_S, _MAX_BACKOFF_S = 0.02, 0.5

_log = logging.getLogger(__name__)


class WorkerChannel:
    """Connects to the scheduler's process, which may listen later, and answers its requests until closed.

    When the thread ends, however that comes, its socket is closed: the scheduler's process then fails what is in flight
    and serves requests without this connector.

    Args:
        path: the Unix socket of the scheduler's process.
        rank: this worker's rank among those that need rows.
        device: the worker's device.
    """

    def __init__(self, path: Path, rank: int, device: torch.device, landing: RowLanding) -> None:
        self._path, self._rank, self._device, self._landing = path, rank, device, landing
        self._closed = threading.Event()
        self._socket: socket.socket | None = None
        self._thread = threading.Thread(target=self._run, name="vitrine worker channel", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self._closed.set()
        if self._socket is not None:
            try:
                self._socket.shutdown(socket.SHUT_RDWR)
            except OSError:  # it has ended already
                _log.debug("the worker channel had ended before it was closed")
        self._thread.join(timeout=5.0)

    def _run(self) -> None:
        try:
            if self._device.type == "cuda":
                torch.cuda.set_device(self._device)
            with self._connect() as connection:
                self._socket = connection
                _send(connection, Hello(rank=self._rank, device=self._device.type))
                while not self._closed.is_set():
                    self._answer_next(connection)
        except PermissionError as error:
            _log.error("no rows land in this worker: %s", error)
        except (OSError, EOFError) as error:  # also at vLLM's end, when the scheduler's process is the first to go
            if not self._closed.is_set():
                _log.info("the channel to vLLM's scheduler has ended (%s): no more rows land in this worker", error)
        except Exception:
            if not self._closed.is_set():
                _log.exception("the worker channel has failed: no more rows land in this worker")

    def _connect(self) -> socket.socket:
        """
        Raises:
            PermissionError: others than this user can enter the socket's folder.
            EOFError: the channel was closed meanwhile.
        """
        backoff = Backoff(_FIRST_BACKOFF_S, _MAX_BACKOFF_S)
        while not self._closed.is_set():
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
            try:
                check_private(self._path)
                connection.connect(str(self._path))
            except PermissionError:
                connection.close()
                raise
            except OSError:  # the scheduler's process does not listen yet
                connection.close()
                time.sleep(backoff.next_s())
            else:
                return connection
        raise EOFError("closed")

    def _answer_next(self, connection: socket.socket) -> None:
        header_nbytes, payload_nbytes = unpack_lengths(bytes(_receive(connection, LENGTHS.size).numpy()))
        request = Request.model_validate_json(bytes(_receive(connection, header_nbytes).numpy()))
        payload = _receive(connection, payload_nbytes, pin_memory=self._device.type == "cuda")
        _send(connection, self._carry_out(request, payload))

    def _carry_out(self, request: Request, payload: torch.Tensor) -> Answer:
        command, landing = request.command, self._landing
        nonce = b""
        try:
            if isinstance(command, Map):
                nonce = landing.map(command)
            elif isinstance(command, Land):
                landing.land(command)
            elif isinstance(command, LandBytes):
                if payload.nbytes != command.rows.nbytes:
                    raise InternalError(f"{payload.nbytes} bytes for rows of {command.rows.nbytes}")
                landing.land_bytes(command.rows, payload)
            elif isinstance(command, Discard):
                landing.discard([command.delivery_id])
            elif isinstance(command, Unmap):
                landing.unmap(command.pool_id)
        except VitrineError as error:
            return Answer(number=request.number, code=error.code, error=str(error))
        except Exception as error:  # CUDA raises many types; this item or this transport fails, not the worker
            return Answer(number=request.number, code=TransportUnavailable.code, error=repr(error))
        return Answer(number=request.number, nonce=nonce.hex())


def _send(connection: socket.socket, message: BaseModel) -> None:
    connection.sendall(pack_frame(message))


def _receive(connection: socket.socket, nbytes: int, pin_memory: bool = False) -> torch.Tensor:
    """Returns the next bytes, flat uint8.

    Raises:
        EOFError: the other side has closed the channel.
    """
    received = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pin_memory and nbytes > 0)
    missing = memoryview(received.numpy())  # type: ignore[arg-type]
    while missing:
        num_read = connection.recv_into(missing)
        if not num_read:
            raise EOFError("closed by the other side")
        missing = missing[num_read:]
    return received
