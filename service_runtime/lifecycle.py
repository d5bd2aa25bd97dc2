"""How a service ends: by a signal, or because a part that it cannot do without has failed.

    SIGTERM, SIGINT -> NOT_SERVING, new requests are refused -> requests in flight complete, or fail at the deadline
    a failure       -> NOT_SERVING, all requests are refused -> reported for a moment, for probes and clients

Then the service cleans up. One second after the deadline the process ends, even if a thread still runs.
"""

from __future__ import annotations

import asyncio
import faulthandler
import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Coroutine
from contextlib import suppress
from typing import Any, NoReturn

from vitrine_vlm.errors import VitrineError
from vitrine_vlm.service_runtime.cancellation import running_until
from vitrine_vlm.service_runtime.grpc_server import ServiceServer
from vitrine_vlm.service_runtime.running_calls import RunningCalls
from vitrine_vlm.service_runtime.supervisor import Failure, ServiceFailed, Supervisor

_log = logging.getLogger(__name__)
# From the deadline to the end of the process.
EXIT_MARGIN_S = 1.0
# How long a failed service still reports its failure.
_REPORT_S = 2.0
# Of requests that an ending service refuses: where there are others, one takes the retry at once.
_RETRY_AFTER_S = 1.0


class Lifecycle:
    """The end of one service. Create it on the service's event loop.

    supervisor: owns all background work of the service.
    reason: why no request is served any more; empty until then.
    """

    def __init__(
        self,
        server: ServiceServer,
        calls: RunningCalls,
        unavailable: Callable[[str], VitrineError],
        drain_timeout_s: float,
    ) -> None:
        """
        Args:
            calls: the requests of all ports.
            unavailable: makes the error for refused or ended requests from a message.
            drain_timeout_s: seconds from the signal to the deadline; a failed service ends earlier.
        """
        self.supervisor = Supervisor()
        self.reason = ""
        self._server = server
        self._calls = calls
        self._unavailable = unavailable
        self._drain_timeout_s = drain_timeout_s
        self._deadline = 0.0
        self._ending = asyncio.Event()
        self.supervisor.on_failure(self._fail)
        for number in (signal.SIGTERM, signal.SIGINT):
            asyncio.get_running_loop().add_signal_handler(number, self._stop)

    @property
    def is_ending(self) -> bool:
        """Whether the service is ending, so that work such as loading should stop; readable from any thread."""
        return self._ending.is_set()

    @property
    def left_s(self) -> float:
        """Seconds to the deadline once the service is ending; at least 0."""
        return max(0.0, self._deadline - time.monotonic())

    async def ending(self) -> None:
        """Waits until the service is ending."""
        await self._ending.wait()

    async def unless_ending(self, work: Coroutine[Any, Any, object]) -> None:
        """Waits for work that is only worth it for a service that goes on: once the service is to end, it is cancelled.

        Raises:
            Exception: what the work raises.
        """
        async with running_until(self._ending, work) as working:
            if working.done():
                working.result()

    def refusal(self) -> VitrineError:
        """The error of a request that the ending service does not take."""
        failure = self.supervisor.failure
        why = "is shutting down" if failure is None else f"has failed ({failure})"
        return self._ended(f"{why}: send the request to another one")

    async def drain(self) -> None:
        """Waits for requests in flight, which fail at the deadline; those of a failed service have failed already."""
        await self._server.set_not_serving_for_good()
        if self.supervisor.failure is not None:
            await asyncio.sleep(self.left_s)
        elif not await self._calls.idle(self.left_s):
            self._cut_off()
        if self.supervisor.failure is None and self._calls.count:
            await self._calls.idle(EXIT_MARGIN_S / 2)
        self._calls.refuse(self.refusal)  # those that come now were not cut off

    def raise_failure(self) -> None:
        """Ends the process at once if it cannot clean up after a failure.

        Raises:
            ServiceFailed: the service has failed.
        """
        failure = self.supervisor.failure
        if failure is None:
            return
        if not failure.can_unwind:
            _end_process(str(failure))
        raise ServiceFailed(f"{failure}: the log has its traceback")

    def _stop(self) -> None:
        if self.is_ending:
            return
        _log.info("draining for at most %g s", self._drain_timeout_s)
        self._end_by(self._drain_timeout_s, "shutting down")
        self._calls.refuse(self.refusal)

    def _fail(self, failure: Failure) -> None:
        report_s = min(_REPORT_S, max(0.0, self._drain_timeout_s - EXIT_MARGIN_S))
        self._end_by(report_s, str(failure))
        self._calls.end(self.refusal)
        # `drain` sets it, too, but the service may be busy before, for instance loading.
        self.supervisor.start_job("health after a failure", self._server.set_not_serving_for_good())

    def _cut_off(self) -> None:
        timeout_s = self._drain_timeout_s
        _log.warning("%d requests still ran after %g s and are cut off", self._calls.count, timeout_s)
        message = f"is shutting down, and the request did not complete within {timeout_s:g} s: send it to another one"
        self._calls.end(lambda: self._ended(message))

    def _ended(self, message: str) -> VitrineError:
        """The error of a request that ends with this service."""
        error = self._unavailable(message)
        error.retry_after_s = _RETRY_AFTER_S
        return error

    def _end_by(self, seconds: float, reason: str) -> None:
        """Sets the deadline, unless an earlier one is set."""
        deadline = time.monotonic() + seconds
        if self.is_ending and deadline >= self._deadline:
            return
        self._deadline = deadline
        self.reason = reason
        self._ending.set()
        end_process_in(seconds + EXIT_MARGIN_S, self.supervisor.names)


def end_process_in(seconds: float, names: Callable[[], list[str]]) -> None:
    """Ends the process with status 1 after this time, even if its threads still run.

    Args:
        names: returns the names of background work that still runs, for the log.
    """

    def end() -> None:
        threads = [thread.name for thread in threading.enumerate() if not thread.daemon]
        _end_process(f"it should have ended by now; still there: {', '.join([*names(), *threads])}")

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    timer.name = "end of process"
    timer.start()
    # C code that holds the interpreter lock keeps the timer from running; faulthandler needs no interpreter lock.
    faulthandler.dump_traceback_later(seconds + EXIT_MARGIN_S / 4, exit=True)


def exit_now(status: int) -> NoReturn:
    """Ends the process at once, its output written.

    The interpreter's own end frees all that torch and its libraries made, which takes about a second on a busy machine:
    more than is left after a deadline.
    """
    with suppress(OSError, ValueError):  # its reader has closed it, or it is closed here
        sys.stdout.flush()
    logging.shutdown()
    os._exit(status)


def _end_process(reason: str) -> None:
    _log.error("the process ends without cleaning up: %s", reason)
    os._exit(1)
