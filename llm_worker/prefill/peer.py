"""A decode worker's view of one prefill worker."""

from __future__ import annotations

import grpc

from vitrine_vlm.embedding_transport.fleet.row_peer import ConnectOptions, RowPeer, RowStub
from vitrine_vlm.errors import PrefillUnavailable
from vitrine_vlm.llm_worker.prefill.kv_format import KvFormat, check_format
from vitrine_vlm.llm_worker.prefill.wire import format_from_proto
from vitrine_vlm.protos.prefill.v1 import prefill_pb2, prefill_pb2_grpc


class PrefillPeer(RowPeer[KvFormat]):
    """A prefill worker and the connection to it.

    Args:
        expected: the format that its KV must have.
    """

    service = "prefill worker"
    unavailable = PrefillUnavailable

    def __init__(self, address: str, options: ConnectOptions, expected: KvFormat) -> None:
        super().__init__(address, options)
        self._expected = expected

    async def _describe(self, channel: grpc.aio.Channel) -> KvFormat:
        message = await prefill_pb2_grpc.PrefillStub(channel).Describe(prefill_pb2.DescribeRequest())
        kv_format = format_from_proto(message)
        check_format(f"prefill worker {self.address}", kv_format, self._expected)
        return kv_format

    def _stub(self, channel: grpc.aio.Channel) -> RowStub:
        return prefill_pb2_grpc.PrefillStub(channel)
