"""The format of the KV rows that two workers exchange."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vitrine_vlm.dtypes import ROW_DTYPES
from vitrine_vlm.errors import PrefillMismatch
from vitrine_vlm.llm_worker.engine.config import KvCacheDtype
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.types import ModelIdentity

PROTOCOL_VERSION = 2


@dataclass(frozen=True)
class KvFormat:
    """Must be equal on both workers. A row holds the keys and values of one token in all layers.

    dtype: of the KV cache, a name of ROW_DTYPES. The scales of a cache in FP8 are the checkpoint's, so equal where
        `revision` is.
    """

    model: str
    revision: str
    model_type: str
    dtype: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    protocol_version: int = PROTOCOL_VERSION

    @classmethod
    def of(cls, identity: ModelIdentity, config: TextConfig, kv_cache_dtype: KvCacheDtype = "auto") -> KvFormat:
        return cls(
            identity.model,
            identity.revision,
            identity.model_type,
            identity.dtype if kv_cache_dtype == "auto" else "float8_e4m3fn",
            config.num_hidden_layers,
            config.num_key_value_heads,
            config.head_dim,
        )

    @property
    def row_width(self) -> int:
        """Elements in one row."""
        return self.num_layers * 2 * self.num_key_value_heads * self.head_dim

    @property
    def row_nbytes(self) -> int:
        return self.row_width * ROW_DTYPES[self.dtype].itemsize


def check_format(other: str, received: KvFormat, expected: KvFormat) -> None:
    """Compares the formats of two workers.

    Args:
        other: the name of the other worker, for the message. received: its format. expected: this worker's.

    Raises:
        PrefillMismatch: names the first field that differs, with both values.
    """
    for field in fields(KvFormat):
        value, expected_value = getattr(received, field.name), getattr(expected, field.name)
        if value != expected_value:
            raise PrefillMismatch(
                f"{other} has another {field.name}: {value!r}, this worker has {expected_value!r}; "
                "start both from the same checkpoint, with the same --dtype and --kv-cache-dtype"
            )
