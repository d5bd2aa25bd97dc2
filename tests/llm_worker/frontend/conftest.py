"""A worker in this process, and clients of its HTTP port."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import openai
import pytest

from tests.llm_worker.frontend.http_client import Client, client_of
from tests.llm_worker.frontend.serving import LocalWorker, serving


@pytest.fixture
async def worker(qwen3_vl_folder: Path) -> AsyncIterator[LocalWorker]:
    async with serving(qwen3_vl_folder) as worker:
        yield worker


@pytest.fixture
async def client(worker: LocalWorker) -> AsyncIterator[Client]:
    async with client_of(worker.served) as client:
        yield client


@pytest.fixture
async def official(worker: LocalWorker) -> AsyncIterator[openai.AsyncOpenAI]:
    async with (
        client_of(worker.served) as client,
        openai.AsyncOpenAI(base_url=str(client.make_url("/v1")), api_key="unused", max_retries=0) as official,
    ):
        yield official
