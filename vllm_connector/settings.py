"""The connector's settings: what stands in `ec_connector_extra_config` of vLLM's `--ec-transfer-config`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Self

from pydantic import ConfigDict, Field, ValidationError

from vitrine_vlm.embedding_transport.clients.settings import EncoderSettings


class ConnectorSettings(EncoderSettings):
    """Where encoders are, and what the connector does with their rows."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    tenant: str = Field("", description="encoders reuse cached rows within one tenant only; mode M: the gateway's")
    max_landed_bytes: int = Field(
        1 << 30, gt=0, description="memory of each vLLM worker for rows that are not in vLLM's own cache yet, bytes"
    )
    deliver_timeout_s: float = Field(
        10.0, gt=0, description="mode P: time for an item, after which vLLM's own tower encodes it, s"
    )
    check_revision: bool = Field(
        True, description="refuse encoders whose checkpoint folder differs from vLLM's, where both serve a folder"
    )

    @classmethod
    def from_extra_config(cls, extra_config: Mapping[str, Any]) -> Self:
        """
        Raises:
            ValueError: names every setting that is unknown, missing or out of range.
        """
        try:
            settings = cls.model_validate(extra_config)
        except ValidationError as error:
            problems = "; ".join(f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors())
            raise ValueError(f"ec_connector_extra_config: {problems}") from error
        if not settings.encoders:
            raise ValueError('ec_connector_extra_config: encoders is missing, e.g. "encoders": "localhost:8100"')
        settings.encoder_tls()  # checks what belongs together
        return settings
