"""API keys: who a request comes from, and how much each key may ask for.

A service knows the SHA-256 of a key only. A slow hash would protect passwords, which can be guessed; a key of 256
random bits cannot, so a fast one is as safe, and costs a request microseconds. The hash of what a caller sent is looked
up in a dict: the time of that may depend on how many of its bits are right, but a caller can choose a key only, not its
hash.
"""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass

from vitrine_vlm.errors import RateLimited, Unauthenticated
from vitrine_vlm.service_runtime.key_metrics import KeyMetrics
from vitrine_vlm.service_runtime.token_bucket import TokenBucket

_SCHEME = "bearer"
# Weight of the latest request in the mean duration of a key's requests.
_LATEST_WEIGHT = 0.1


@dataclass(frozen=True)
class ApiKey:
    """What is known of a key, besides its hash. None is no limit.

    name: for logs and metrics. tenant: of its requests; with "" a trusted header may set it.
    """

    name: str
    tenant: str = ""
    requests_per_minute: float | None = None
    media_bytes_per_minute: float | None = None
    max_in_flight: int | None = None


def key_hash(key: str) -> bytes:
    """Returns the SHA-256 of a key, by which it is known; 32 bytes."""
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


class KeyAccount:
    """What a key has used. It belongs to one event loop.

    key: as it is configured now.
    """

    def __init__(self, key: ApiKey, metrics: KeyMetrics, clock: Callable[[], float]) -> None:
        self.key = key
        self._metrics = metrics
        self._clock = clock
        self._in_flight = 0
        self._mean_s = 0.0
        self._requests = self._bucket(key.requests_per_minute)
        self._media = self._bucket(key.media_bytes_per_minute)

    def configure(self, key: ApiKey) -> None:
        """Changes the key's limits. Those that stay keep what has been used of them."""
        if key.requests_per_minute != self.key.requests_per_minute:
            self._requests = self._bucket(key.requests_per_minute)
        if key.media_bytes_per_minute != self.key.media_bytes_per_minute:
            self._media = self._bucket(key.media_bytes_per_minute)
        self.key = key

    def begin(self) -> Callable[[], None]:
        """Counts one request, in flight until the returned function is called.

        Raises:
            RateLimited: the key has as many requests in flight, or has begun as many in this minute, as it may.
        """
        limit = self.key.max_in_flight
        if limit is not None and self._in_flight >= limit:
            message = f"the key {self.key.name} has {self._in_flight} requests in flight, and may have {limit}"
            raise self._refused("in_flight", f"{message}: wait for one to end", self._mean_s / limit)
        if self._requests is not None and (wait_s := self._requests.take()):
            message = f"the key {self.key.name} may begin {self.key.requests_per_minute:g} requests a minute"
            raise self._refused("requests", f"{message}: the next one in {wait_s:.1f} s", wait_s)
        self._metrics.count_request(self.key.name)
        self._in_flight += 1
        begun_at = self._clock()

        def end() -> None:
            self._in_flight -= 1
            duration_s = self._clock() - begun_at
            self._mean_s += (duration_s - self._mean_s) * (_LATEST_WEIGHT if self._mean_s else 1.0)

        return end

    def take_media(self, nbytes: int) -> None:
        """Counts bytes of media.

        Raises:
            RateLimited: they are more than the key may send now.
        """
        if self._media is None or not nbytes:
            return
        if wait_s := self._media.take(nbytes):
            message = f"the key {self.key.name} may send {self.key.media_bytes_per_minute:g} bytes of media a minute"
            raise self._refused("media_bytes", f"{message}: these {nbytes} in {wait_s:.1f} s", wait_s)

    def _bucket(self, per_minute: float | None) -> TokenBucket | None:
        return None if per_minute is None else TokenBucket(per_minute, self._clock)

    def _refused(self, reason: str, message: str, retry_after_s: float) -> RateLimited:
        self._metrics.count_refusal(self.key.name, reason)
        return RateLimited(message, retry_after_s)


class ApiKeys:
    """The keys of a service. With none of them every request is refused."""

    def __init__(
        self, keys: Mapping[bytes, ApiKey], metrics: KeyMetrics, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """
        Args:
            keys: by their hashes, see `key_hash`.
            clock: returns seconds.
        """
        self._metrics = metrics
        self._clock = clock
        self._accounts: dict[bytes, KeyAccount] = {}
        self.replace(keys)

    def replace(self, keys: Mapping[bytes, ApiKey]) -> None:
        """Changes the keys. Requests in flight of keys that are gone continue."""
        accounts: dict[bytes, KeyAccount] = {}
        for digest, key in keys.items():
            account = self._accounts.get(digest)
            if account is None:
                account = KeyAccount(key, self._metrics, self._clock)
            account.configure(key)
            accounts[digest] = account
        self._accounts = accounts

    def account_of(self, authorization: str | None) -> KeyAccount:
        """
        Args:
            authorization: the header of this name, "Bearer KEY".

        Raises:
            Unauthenticated: there is no key in it, or one that is not known.
        """
        scheme, _, key = (authorization or "").strip().partition(" ")
        key = key.strip()
        if scheme.lower() != _SCHEME or not key:
            self._metrics.count_refusal("", "no_key")
            raise Unauthenticated("an API key is needed: send it in the header Authorization, as Bearer KEY")
        account = self._accounts.get(key_hash(key))
        if account is None:
            self._metrics.count_refusal("", "unknown_key")
            raise Unauthenticated("the API key is not known here: check it, and where it is sent")
        return account


_account: ContextVar[KeyAccount | None] = ContextVar("api_key_account", default=None)


def set_account(account: KeyAccount | None) -> None:
    """Sets whose request the current task, and the tasks that it starts from now on, serve."""
    _account.set(account)


def has_account() -> bool:
    """Whether the current task's request came with a key."""
    return _account.get() is not None


def take_media(nbytes: int) -> None:
    """Counts bytes of media that the current task's request has sent, against its key if it came with one.

    Raises:
        RateLimited: they are more than the key may send now.
    """
    account = _account.get()
    if account is not None:
        account.take_media(nbytes)
