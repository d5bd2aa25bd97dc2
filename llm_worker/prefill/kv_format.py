"""What the rows of KV are that two workers exchange."""

from __future__ import annotations

from dataclasses import dataclass, fields

from vitrine_vlm.errors import PrefillMismatch
from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.types import DTYPES, ModelIdentity

PROTOCOL_VERSION = 2


@dataclass(frozen=True)
class KvFormat:
    """Two workers must agree on it field by field; a row holds keys and values of all layers of one token."""

    model: str
    revision: str
    model_type: str
    dtype: str
    num_layers: int
    num_key_value_heads: int
    head_dim: int
    protocol_version: int = PROTOCOL_VERSION

    @classmethod
    def of(cls, identity: ModelIdentity, config: TextConfig) -> KvFormat:
        return cls(
            identity.model,
            identity.revision,
            identity.model_type,
            identity.dtype,
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
        return self.row_width * DTYPES[self.dtype].itemsize


def check_format(other: str, theirs: KvFormat, ours: KvFormat) -> None:
    """
    Args:
        other: who the other worker is, for the message.

    Raises:
        PrefillMismatch: names the first field that differs, with both values.
    """
    for field in fields(KvFormat):
        their_value, our_value = getattr(theirs, field.name), getattr(ours, field.name)
        if their_value != our_value:
            raise PrefillMismatch(
                f"{other} has another {field.name}: {their_value!r}, this worker has {our_value!r}; "
                "start both from the same checkpoint, with the same dtype"
            )
