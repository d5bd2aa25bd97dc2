"""A host of its own on the other end of a bad line: a network namespace, joined by a link that the test rules.

Both ends are TUN devices. The test's process carries the IP packets between them, late, or not at all. It needs root.
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import fcntl
import os
import random
import socket
import struct
from collections.abc import AsyncIterator, Iterator

_CLONE_NEWNET = 0x40000000
# linux/if_tun.h and linux/sockios.h
_TUNSETIFF, _IFF_TUN, _IFF_NO_PI = 0x400454CA, 0x0001, 0x1000
_SIOCSIFADDR, _SIOCSIFNETMASK, _SIOCSIFFLAGS, _IFF_UP = 0x8916, 0x891C, 0x8914, 0x1
_MAX_PACKET_NBYTES = 65_536
_NETMASK = "255.255.255.0"
_libc = ctypes.CDLL(None, use_errno=True)


class Namespace:
    """A network namespace with a loopback device, and one TUN device with an address."""

    def __init__(self, address: str) -> None:
        """
        Raises:
            OSError: this process may not make one, or the kernel has no TUN devices.
        """
        self.address = address
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _check(_libc.unshare(_CLONE_NEWNET))
            self._namespace = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
            try:
                self.tun = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
                fcntl.ioctl(self.tun, _TUNSETIFF, struct.pack("16sH14x", b"link", _IFF_TUN | _IFF_NO_PI))
                with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
                    for request, value in ((_SIOCSIFADDR, address), (_SIOCSIFNETMASK, _NETMASK)):
                        packed = struct.pack("16sHH4s8x", b"link", socket.AF_INET, 0, socket.inet_aton(value))
                        fcntl.ioctl(control, request, packed)
                    for device in (b"link", b"lo"):
                        fcntl.ioctl(control, _SIOCSIFFLAGS, struct.pack("16sH14x", device, _IFF_UP))
            finally:
                _check(_libc.setns(own, _CLONE_NEWNET))
        finally:
            os.close(own)

    @property
    def prefix(self) -> tuple[str, ...]:
        """What a command begins with that is to run in here."""
        return ("nsenter", f"--net=/proc/{os.getpid()}/fd/{self._namespace}")

    @contextlib.contextmanager
    def entered(self) -> Iterator[None]:
        """Sockets that this thread makes inside the context are in here."""
        own = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
        try:
            _check(_libc.setns(self._namespace, _CLONE_NEWNET))
            yield
        finally:
            _check(_libc.setns(own, _CLONE_NEWNET))
            os.close(own)

    def close(self) -> None:
        os.close(self.tun)
        os.close(self._namespace)


class Link:
    """Carries packets between two namespaces. Create it with `between`.

    delay_s: of each packet. loss: share of the packets that are lost.
    is_cut: whether no packet passes, of which neither side is notified.
    """

    def __init__(self, seed: int) -> None:
        self.delay_s = 0.0
        self.loss = 0.0
        self.is_cut = False
        self.num_carried = self.num_lost = 0
        self._random = random.Random(seed)

    @classmethod
    @contextlib.asynccontextmanager
    async def between(cls, first: Namespace, second: Namespace, seed: int = 0) -> AsyncIterator[Link]:
        link = cls(seed)
        loop = asyncio.get_running_loop()
        ends = (first.tun, second.tun)
        for source, target in (ends, ends[::-1]):
            loop.add_reader(source, link._carry, source, target)
        try:
            yield link
        finally:
            for source in ends:
                loop.remove_reader(source)

    def _carry(self, source: int, target: int) -> None:
        while True:
            try:
                packet = os.read(source, _MAX_PACKET_NBYTES)
            except BlockingIOError:
                return
            if self.is_cut or self._random.random() < self.loss:
                self.num_lost += 1
            elif self.delay_s:
                asyncio.get_running_loop().call_later(self.delay_s, self._deliver, packet, target)
            else:
                self._deliver(packet, target)

    def _deliver(self, packet: bytes, target: int) -> None:
        if self.is_cut:
            self.num_lost += 1
            return
        with contextlib.suppress(BlockingIOError):  # a full queue loses packets, as routers do
            os.write(target, packet)
            self.num_carried += 1


def _check(result: int) -> None:
    if result:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
