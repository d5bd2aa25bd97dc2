"""Keys, their limits, their file, and the tenant of a request."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
from pathlib import Path
from typing import Any

import pytest
import yaml
from prometheus_client import CollectorRegistry
from pydantic import SecretStr

from tests.service_runtime.clock import Clock
from vitrine_vlm.errors import BadRequest, RateLimited, Unauthenticated
from vitrine_vlm.service_runtime.access import Access
from vitrine_vlm.service_runtime.access_settings import AccessSettings
from vitrine_vlm.service_runtime.api_keys import ApiKey, ApiKeys, KeyAccount, key_hash, take_media
from vitrine_vlm.service_runtime.api_keys_file import KeysFile, parse_keys
from vitrine_vlm.service_runtime.key_metrics import KeyMetrics
from vitrine_vlm.service_runtime.logs import start_logging
from vitrine_vlm.service_runtime.supervisor import Supervisor
from vitrine_vlm.service_runtime.tenants import current_tenant

ALICE, BOB = "a-long-key-of-alice", "a-long-key-of-bob"


def bearer(key: str) -> dict[str, str]:
    return {"authorization": f"Bearer {key}"}


def entry(key: str, name: str, tenant: str = "", **limits: float) -> dict[str, Any]:
    return {"name": name, "sha256": hashlib.sha256(key.encode()).hexdigest(), "tenant": tenant, **limits}


def metrics() -> tuple[CollectorRegistry, KeyMetrics]:
    registry = CollectorRegistry()
    return registry, KeyMetrics(registry, "vitrine_test")


def refused(registry: CollectorRegistry, key: str, reason: str) -> float | None:
    return registry.get_sample_value("vitrine_test_key_refusals_total", {"key": key, "reason": reason})


class TestKeys:
    @pytest.fixture
    def registry(self) -> CollectorRegistry:
        return CollectorRegistry()

    @pytest.fixture
    def keys(self, registry: CollectorRegistry) -> ApiKeys:
        return ApiKeys({key_hash(ALICE): ApiKey("alice", "a")}, KeyMetrics(registry, "vitrine_test"))

    @pytest.mark.parametrize("header", [f"Bearer {ALICE}", f"bearer {ALICE}", f"  BEARER   {ALICE} "])
    def test_the_key_is_found_in_the_header(self, keys: ApiKeys, header: str) -> None:
        assert keys.account_of(header).key.name == "alice"

    @pytest.mark.parametrize(
        ("header", "reason"),
        [
            (None, "no_key"),
            ("", "no_key"),
            ("Bearer", "no_key"),
            ("Bearer ", "no_key"),
            (f"Basic {ALICE}", "no_key"),
            (ALICE, "no_key"),
            (f"Bearer {BOB}", "unknown_key"),
            (f"Bearer {ALICE[:-1]}", "unknown_key"),
            (f"Bearer {ALICE} {ALICE}", "unknown_key"),
            (f"Bearer {hashlib.sha256(ALICE.encode()).hexdigest()}", "unknown_key"),
            ("Bearer caf\u00e9 \udcff", "unknown_key"),
        ],
    )
    def test_no_other_is(self, keys: ApiKeys, registry: CollectorRegistry, header: str | None, reason: str) -> None:
        with pytest.raises(Unauthenticated) as caught:
            keys.account_of(header)
        assert header is None or len(header) < 10 or header[7:] not in str(caught.value)
        assert refused(registry, "", reason) == 1

    def test_metrics_have_no_more_names_than_a_limit(self) -> None:
        registry, counted = metrics()
        for number in range(1500):
            counted.count_request(f"key{number}")
        assert registry.get_sample_value("vitrine_test_key_requests_total", {"key": "other"}) == 500


class TestLimits:
    @pytest.fixture
    def clock(self) -> Clock:
        return Clock()

    def account(self, clock: Clock, **limits: Any) -> KeyAccount:
        return KeyAccount(ApiKey("alice", **limits), metrics()[1], clock)

    def test_requests_a_minute(self, clock: Clock) -> None:
        account = self.account(clock, requests_per_minute=6)
        for _ in range(6):
            account.begin()()
        with pytest.raises(RateLimited, match="alice may begin 6 requests a minute") as caught:
            account.begin()
        assert caught.value.retry_after_s == pytest.approx(10)
        clock.now_s += 10
        account.begin()

    def test_requests_in_flight(self, clock: Clock) -> None:
        account = self.account(clock, max_in_flight=2)
        first, _ = account.begin(), account.begin()
        with pytest.raises(RateLimited, match="2 requests in flight"):
            account.begin()
        clock.now_s += 8
        first()
        account.begin()
        with pytest.raises(RateLimited) as caught:
            account.begin()
        assert caught.value.retry_after_s == pytest.approx(4), "of 2 that take 8 s each one ends every 4 s"

    def test_bytes_of_media(self, clock: Clock) -> None:
        account = self.account(clock, media_bytes_per_minute=6000)
        account.take_media(5000)
        account.take_media(0)
        with pytest.raises(RateLimited, match="these 3000") as caught:
            account.take_media(3000)
        assert caught.value.retry_after_s == pytest.approx(20)

    async def test_media_count_against_the_key_of_the_task(self) -> None:
        access = Access(ApiKeys({key_hash(ALICE): ApiKey("alice", media_bytes_per_minute=10)}, metrics()[1]))

        async def serve(nbytes: int) -> None:
            access.begin(bearer(ALICE))
            await asyncio.create_task(asyncio.to_thread(lambda: None))
            take_media(nbytes)

        await asyncio.create_task(serve(10))
        with pytest.raises(RateLimited):
            await asyncio.create_task(serve(1))
        take_media(1000)  # of a request without a key

    def test_limits_change_without_what_was_used(self, clock: Clock) -> None:
        keys = ApiKeys({key_hash(ALICE): ApiKey("alice", requests_per_minute=2, max_in_flight=1)}, metrics()[1], clock)
        account = keys.account_of(f"Bearer {ALICE}")
        end = account.begin()
        keys.replace({key_hash(ALICE): ApiKey("alice", requests_per_minute=2)})
        account.begin()
        with pytest.raises(RateLimited, match="2 requests a minute"):
            account.begin()
        keys.replace({})
        with pytest.raises(Unauthenticated):
            keys.account_of(f"Bearer {ALICE}")
        end()


class TestFile:
    def test_yaml_and_json(self) -> None:
        content = {"keys": [entry(ALICE, "alice", "a", requests_per_minute=60, max_in_flight=3), entry(BOB, "bob")]}
        wanted = {key_hash(ALICE): ApiKey("alice", "a", 60, None, 3), key_hash(BOB): ApiKey("bob")}
        assert parse_keys(yaml.safe_dump(content).encode()) == parse_keys(json.dumps(content).encode()) == wanted

    @pytest.mark.parametrize(
        ("entries", "named"),
        [
            ([{"name": "alice", "sha256": "0" * 64}], "tenant"),
            ([entry(ALICE, "alice") | {"sha256": ALICE}], "sha256"),
            ([entry(ALICE, "alice") | {"key": 1}], "keys.0.key"),
            ([entry(ALICE, "two words")], "name"),
            ([entry(ALICE, "alice", max_in_flight=0)], "max_in_flight"),
            ([entry(ALICE, "alice", requests_per_minute=-1)], "requests_per_minute"),
            ([entry(ALICE, "alice"), entry(BOB, "alice")], "twice"),
            ([entry(ALICE, "alice"), entry(ALICE, "bob")], "twice"),
            ("none", "keys"),
        ],
    )
    def test_errors_name_the_place_and_no_value(self, entries: Any, named: str) -> None:
        with pytest.raises(ValueError, match=named) as caught:
            parse_keys(json.dumps({"keys": entries}).encode())
        assert ALICE not in str(caught.value)

    @pytest.mark.parametrize("content", [b"keys: [", b"\xff\xfe\x00", b"", b"[" * 500, f"keys: {{{ALICE}".encode()])
    def test_what_is_no_file_of_keys(self, content: bytes) -> None:
        with pytest.raises(ValueError) as caught:
            parse_keys(content)
        assert ALICE not in str(caught.value)

    async def test_it_is_read_again_and_a_broken_one_changes_nothing(
        self, tmp_path: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        file = tmp_path / "keys.yaml"
        seen: list[dict[bytes, ApiKey]] = []
        file.write_text(yaml.safe_dump({"keys": [entry(ALICE, "alice")]}))
        keys_file = KeysFile(file, seen.append)
        keys_file.load()
        supervisor = Supervisor()
        supervisor.start_task("API keys", keys_file.watch(0.01))

        async def until(done: Any) -> None:
            async with asyncio.timeout(5):
                while not done():
                    await asyncio.sleep(0.01)

        with caplog.at_level(logging.INFO):
            for broken in ("keys: [", "keys: 3"):
                file.write_text(broken)
                num_errors = len(caplog.records)
                await until(lambda num=num_errors: len(caplog.records) > num)
            file.unlink()
            await until(lambda: "No such file" in caplog.text)
            await asyncio.sleep(0.1)
            assert len(seen) == 1 and len(caplog.records) == 3, "each problem is logged once"
            file.write_text(yaml.safe_dump({"keys": [entry(BOB, "bob")]}))
            await until(lambda: len(seen) == 2)
            assert seen[1] == {key_hash(BOB): ApiKey("bob")}
            file.write_text("keys: []")
            await until(lambda: len(seen) == 3)
        assert seen[2] == {}
        assert supervisor.failure is None
        await supervisor.close()


class TestAccess:
    """The tenant: the key's, the trusted header's, or the service's."""

    @pytest.fixture
    def keys(self) -> ApiKeys:
        return ApiKeys({key_hash(ALICE): ApiKey("alice", "a"), key_hash(BOB): ApiKey("bob")}, metrics()[1])

    def test_without_anything_configured_all_are_admitted(self) -> None:
        access = Access()
        assert not access.needs_key and not access.has_tenants
        access.begin({"x-tenant": "mine"})()
        assert current_tenant() == ""

    def test_a_header_counts_only_where_it_is_trusted(self) -> None:
        trusting = Access(tenant_header="x-tenant", tenant="default")
        for headers, tenant in (({"x-tenant": "mine"}, "mine"), ({}, "default"), ({"x-tenant": ""}, "default")):
            trusting.begin(headers)
            assert current_tenant() == tenant
        Access(tenant="default").begin({"x-tenant": "mine"})
        assert current_tenant() == "default"

    @pytest.mark.parametrize("tenant", ["x" * 257, "\udcff"])
    def test_a_tenant_that_cannot_be_one_is_refused(self, tenant: str) -> None:
        with pytest.raises(BadRequest, match="x-tenant"):
            Access(tenant_header="x-tenant").begin({"x-tenant": tenant})

    def test_the_keys_tenant_wins(self, keys: ApiKeys) -> None:
        access = Access(keys, tenant_header="x-tenant", tenant="default")
        access.begin(bearer(ALICE) | {"x-tenant": "b"})
        assert current_tenant() == "a"
        access.begin(bearer(BOB) | {"x-tenant": "b"})
        assert current_tenant() == "b"
        access.begin(bearer(BOB))
        assert current_tenant() == "default"

    def test_a_refused_request_has_nothing_of_the_one_before(self, keys: ApiKeys) -> None:
        access = Access(keys)
        access.begin(bearer(ALICE))
        with pytest.raises(Unauthenticated):
            access.begin({})
        assert current_tenant() == ""

    def test_log_lines_have_the_keys_name_and_never_the_key(
        self, keys: ApiKeys, capsys: pytest.CaptureFixture[str]
    ) -> None:
        root = logging.getLogger()
        handlers, level = root.handlers[:], root.level
        try:
            start_logging("info", "json")
            Access(keys).begin(bearer(ALICE))
            logging.getLogger("test").info("served")
            Access().begin({})
            logging.getLogger("test").info("served")
        finally:
            root.handlers[:] = handlers
            root.setLevel(level)
        lines = [json.loads(line) for line in capsys.readouterr().err.splitlines()]
        assert [line.get("key_name") for line in lines] == ["alice", None]


class TestSettings:
    def test_several_keys_and_a_file(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.yaml"
        file.write_text(yaml.safe_dump({"keys": [entry(BOB, "bob", "b")]}))
        settings = AccessSettings(api_key=SecretStr(f"{ALICE}, another-long-key-0"), api_keys_file=file)
        access = settings.make_access(CollectorRegistry(), "vitrine_test")
        for key in (ALICE, "another-long-key-0", BOB):
            access.begin(bearer(key))
        with pytest.raises(Unauthenticated):
            access.begin(bearer("another-long-key-1"))
        assert ALICE not in repr(settings) + str(settings.model_dump()) + settings.model_dump_json()

    @pytest.mark.parametrize("key", ["short", "a key with spaces in it", "x" * 300])
    def test_keys_that_can_be_guessed_or_sent_by_no_header(self, key: str) -> None:
        with pytest.raises(ValueError, match="16 to 256"):
            AccessSettings(api_key=SecretStr(key))

    def test_a_file_without_keys_admits_nothing(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.yaml"
        file.write_text("keys: []")
        access = AccessSettings(api_keys_file=file).make_access(CollectorRegistry(), "vitrine_test")
        with pytest.raises(Unauthenticated):
            access.begin({})

    def test_a_wrong_file_is_named(self, tmp_path: Path) -> None:
        file = tmp_path / "keys.yaml"
        with pytest.raises(OSError, match=r"keys\.yaml"):
            AccessSettings(api_keys_file=file).make_access(CollectorRegistry(), "vitrine_test")
        file.write_text("key: []")
        with pytest.raises(ValueError, match=r"keys\.yaml: keys: Field required"):
            AccessSettings(api_keys_file=file).make_access(CollectorRegistry(), "vitrine_test")
