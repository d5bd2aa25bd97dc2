"""A client's connection to one encoder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import TypeAlias

import grpc

from vitrine_vlm.embedding_transport.fleet.row_peer import ConnectOptions, RowPeer, RowStub
from vitrine_vlm.embedding_transport.wire.messages import describe_identity
from vitrine_vlm.errors import EncoderMismatch, EncoderUnavailable
from vitrine_vlm.protos.encoder.v1 import encoder_pb2, encoder_pb2_grpc
from vitrine_vlm.types import ModelIdentity

# Called with an encoder's address and its answer to Describe; raises EncoderMismatch if the encoder cannot be used.
DescriptionCheck: TypeAlias = Callable[[str, encoder_pb2.DescribeResponse], None]


@dataclass(frozen=True)
class EncoderDescription:
    """An encoder's answer to Describe.

    merge_size: the number of patches merged into one token along each side.
    minor_version: of the protocol; 0 for encoders from before patches and tickets.
    instance_id: names the encoder's process; empty for those.
    ticket_ttl_s: seconds from its layout, or last renewal, for which a ticket can be claimed; 0 for those.
    """

    identity: ModelIdentity
    merge_size: int
    minor_version: int
    instance_id: str
    ticket_ttl_s: float


class EncoderPeer(RowPeer[EncoderDescription]):
    """The connection to one encoder.

    Args:
        expected: the model that the encoder must serve; None accepts any.
        check: for clients that compare something else than a whole `ModelIdentity`.
    """

    service = "encoder"
    unavailable = EncoderUnavailable

    def __init__(
        self,
        address: str,
        options: ConnectOptions,
        expected: ModelIdentity | None,
        check: DescriptionCheck | None = None,
    ) -> None:
        super().__init__(address, options)
        self._expected = expected
        self._check = check

    async def _describe(self, channel: grpc.aio.Channel) -> EncoderDescription:
        description = await encoder_pb2_grpc.EncoderStub(channel).Describe(encoder_pb2.DescribeRequest())
        identity = describe_identity(description)
        if self._expected is not None:
            check_identity(self.address, identity, self._expected)
        if self._check is not None:
            self._check(self.address, description)
        return EncoderDescription(
            identity,
            description.processor.merge_size,
            description.protocol_minor_version,
            description.instance_id,
            description.ticket_ttl_s,
        )

    def _stub(self, channel: grpc.aio.Channel) -> RowStub:
        return encoder_pb2_grpc.EncoderStub(channel)


def check_identity(address: str, served: ModelIdentity, expected: ModelIdentity) -> None:
    """Compares what an encoder serves with what is expected.

    Raises:
        EncoderMismatch: names the first field that differs, with both values.
    """
    for field in fields(ModelIdentity):
        found, needed = getattr(served, field.name), getattr(expected, field.name)
        if found != needed:
            raise EncoderMismatch(
                f"encoder {address} serves another {field.name}: {found!r}, this worker needs {needed!r}; "
                "start both from the same checkpoint"
            )
