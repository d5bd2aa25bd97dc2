"""A lease in several processes of its caller: one talks to the encoder, the others map the pool and read the rows."""

from __future__ import annotations

import asyncio
import hashlib
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path

import grpc

from tests.embedding_transport.clients.encoder_stub import IDENTITY, synthetic_rows
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import PROTOCOL_VERSION

ROOT = Path(__file__).parents[3]
NUM_READERS = 2
NUM_TOKENS = 5

ENCODER = """
import asyncio, sys
from pathlib import Path
from tests.embedding_transport.clients.encoder_stub import running_stub

async def main():
    async with running_stub(Path(sys.argv[1])) as (address, _, _):
        print(address, flush=True)
        await asyncio.to_thread(sys.stdin.read)

asyncio.run(main())
"""

# It never talks to the encoder. A line each in and out.
READER = """
import hashlib, json, sys
from pathlib import Path
import torch
from vitrine_vlm.embedding_transport.pools.shm_pool import ShmMapping
from vitrine_vlm.errors import LeaseExpired

mapping = None
for line in sys.stdin:
    message = json.loads(line)
    answer = {}
    if "pool" in message:
        pool = message["pool"]
        mapping = ShmMapping(Path(sys.argv[1]), pool["name"], pool["nbytes"])
        answer["nonce"] = mapping.read(pool["probe_offset"], pool["probe_nbytes"]).hex()
    else:
        lease, shape = message["lease"], tuple(message["shape"])
        rows = mapping.rows(lease["offset"], shape, torch.float32).clone()
        answer["rows"] = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
        try:
            mapping.check(lease["offset"], lease["lease_id"], lease["generation"], lease["nbytes"])
            answer["valid"] = True
        except LeaseExpired:
            answer["valid"] = False
    print(json.dumps(answer), flush=True)
"""


class Process:
    def __init__(self, process: asyncio.subprocess.Process) -> None:
        assert process.stdin is not None and process.stdout is not None
        self._stdin, self._stdout = process.stdin, process.stdout

    async def line(self) -> str:
        return (await asyncio.wait_for(self._stdout.readline(), 60)).decode().strip()

    async def ask(self, **message: object) -> dict[str, object]:
        self._stdin.write(json.dumps(message).encode() + b"\n")
        answer: dict[str, object] = json.loads(await self.line())
        return answer


@asynccontextmanager
async def running(code: str, folder: Path) -> AsyncIterator[Process]:
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-c", code, str(folder), stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=ROOT
    )
    try:
        yield Process(process)
    finally:
        process.kill()
        await process.wait()


async def test_other_processes_of_the_caller_read_a_lease_that_one_of_them_has(tmp_path: Path) -> None:
    async with AsyncExitStack() as stack:
        encoder = await stack.enter_async_context(running(ENCODER, tmp_path))
        readers = [await stack.enter_async_context(running(READER, tmp_path)) for _ in range(NUM_READERS)]
        channel = await stack.enter_async_context(grpc.aio.insecure_channel(await encoder.line()))
        stub = encoder_pb2_grpc.EncoderStub(channel)

        call = stub.Connect()
        hello = encoder_pb2.Hello(protocol_version=PROTOCOL_VERSION, transports=["shm"])
        await call.write(encoder_pb2.ConnectRequest(hello=hello))
        pool = (await read(call)).offer.shm
        fields = {name: getattr(pool, name) for name in ("name", "nbytes", "probe_offset", "probe_nbytes")}
        nonces = {str((await reader.ask(pool=fields))["nonce"]) for reader in readers}
        assert len(nonces) == 1  # each maps once, for the life of the session
        result = encoder_pb2.ProbeResult(nonce=bytes.fromhex(nonces.pop()))
        await call.write(encoder_pb2.ConnectRequest(probe_result=result))
        session = (await read(call)).session
        assert session.transport == "shm"

        for text in (b"a 5", b"b 5"):  # the second one may lie in the block of the first
            item = encoder_pb2.MediaItem(kind=encoder_pb2.MEDIA_KIND_IMAGE, data=text)
            request = encoder_pb2.EncodeRequest(session_id=session.session_id, items=[item])
            (lease,) = [r.ready.lease async for r in stub.Encode(request) if r.WhichOneof("event") == "ready"]
            message = {
                "lease": {name: getattr(lease, name) for name in ("lease_id", "generation", "offset", "nbytes")},
                "shape": [NUM_TOKENS, IDENTITY.row_width],
            }
            rows = synthetic_rows(text, NUM_TOKENS, IDENTITY)
            expected = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
            answers = await asyncio.gather(*(reader.ask(**message) for reader in readers))
            assert answers == [{"rows": expected, "valid": True}] * NUM_READERS

            release = encoder_pb2.ReleaseRequest(session_id=session.session_id, lease_ids=[lease.lease_id])
            assert (await stub.Release(release)).num_released == 1  # once, behind the last of them
            answers = await asyncio.gather(*(reader.ask(**message) for reader in readers))
            assert [answer["valid"] for answer in answers] == [False] * NUM_READERS, "read after the release"
        call.cancel()


async def read(
    call: grpc.aio.StreamStreamCall[encoder_pb2.ConnectRequest, encoder_pb2.ConnectResponse],
) -> encoder_pb2.ConnectResponse:
    response = await call.read()
    assert isinstance(response, encoder_pb2.ConnectResponse)
    return response
