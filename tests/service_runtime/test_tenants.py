from __future__ import annotations

import asyncio
import hashlib
import itertools

import pytest

from vitrine_vlm.service_runtime.tenants import CacheScope, current_tenant, set_tenant


def test_no_two_scopes_have_one_digest() -> None:
    words = ("", "a", "b", "ab", "a\0b", "1:a", "\x01", "é", "\ud800")
    scopes = [CacheScope(tenant, salt) for tenant, salt in itertools.product(words, words)]
    assert len({scope.digest() for scope in scopes}) == len({scope.encoder_tenant for scope in scopes}) == len(scopes)


def test_without_tenant_and_salt_nothing_changes() -> None:
    assert (CacheScope().digest(), CacheScope().encoder_tenant) == (b"", "")
    assert CacheScope("red").encoder_tenant == "red", "as gateways and their tickets name it"


@pytest.mark.parametrize("salt", ["", "x" * 16, "\0" * 128])
def test_a_digest_is_the_hash_of_no_block_of_tokens(salt: str) -> None:
    """A salt is the client's choice: with it no block of another's prompt can be aimed at."""
    digest = CacheScope("", salt).digest()
    assert digest != hashlib.sha256(salt.encode()).digest()
    assert digest != hashlib.sha256(len(salt).to_bytes(8, "little") + salt.encode()).digest()


async def test_tasks_and_threads_have_the_tenant_of_their_request() -> None:
    async def serve(tenant: str) -> tuple[str, str, str]:
        set_tenant(tenant)
        await asyncio.sleep(0)
        in_task = await asyncio.create_task(asyncio.to_thread(current_tenant))
        return current_tenant(), in_task, await asyncio.to_thread(current_tenant)

    served = await asyncio.gather(*(asyncio.create_task(serve(tenant)) for tenant in ("red", "blue")))
    assert served == [("red",) * 3, ("blue",) * 3]
    assert current_tenant() == ""
