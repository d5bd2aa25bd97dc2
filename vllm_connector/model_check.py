"""Compares what an encoder describes with the model that vLLM serves."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vitrine_vlm.errors import EncoderMismatch
from vitrine_vlm.model_loading.checkpoint import CheckpointError, open_checkpoint
from vitrine_vlm.protos.encoder.v1 import encoder_pb2
from vitrine_vlm.types import PROTOCOL_VERSION
from vitrine_vlm.vllm_connector.fetching import RowFormat

# The first minor version of the protocol with patches and tickets.
_NEEDED_MINOR_VERSION = 1
_FINGERPRINT_LENGTH = 64

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ServedModel:
    """vLLM's model, as far as an encoder must agree with it.

    revision: the fingerprint of its folder; empty where it is not a folder, or not to be compared.
    """

    model_type: str
    out_hidden_size: int
    deepstack_visual_indexes: tuple[int, ...]
    dtype: str
    patch_size: int
    temporal_patch_size: int
    merge_size: int
    revision: str = ""

    @property
    def row_format(self) -> RowFormat:
        return RowFormat(self.dtype, self.out_hidden_size * (1 + len(self.deepstack_visual_indexes)))

    def check(self, address: str, description: encoder_pb2.DescribeResponse) -> None:
        """
        Raises:
            EncoderMismatch: names what differs, with both values.
        """
        processor = description.processor
        compared: list[tuple[str, Any, Any]] = [
            ("protocol_version", description.protocol_version, PROTOCOL_VERSION),
            ("model_type", description.model_type, self.model_type),
            ("out_hidden_size", description.out_hidden_size, self.out_hidden_size),
            (
                "deepstack_visual_indexes",
                tuple(description.deepstack_visual_indexes),
                self.deepstack_visual_indexes,
            ),
            ("dtype", description.dtype, self.dtype),
            ("patch_size", processor.patch_size, self.patch_size),
            ("temporal_patch_size", processor.temporal_patch_size, self.temporal_patch_size),
            ("merge_size", processor.merge_size, self.merge_size),
        ]
        # A hub commit says nothing about a folder.
        if self.revision and len(description.revision.removeprefix("dummy-")) == _FINGERPRINT_LENGTH:
            compared.append(("revision", description.revision, self.revision))
        differing = [f"{name} {found!r}, vLLM's is {needed!r}" for name, found, needed in compared if found != needed]
        if description.protocol_minor_version < _NEEDED_MINOR_VERSION:
            differing.append(
                f"protocol_minor_version {description.protocol_minor_version}, the connector needs "
                f"{_NEEDED_MINOR_VERSION}: update the encoder"
            )
        if differing:
            raise EncoderMismatch(
                f"encoder {address} cannot serve this vLLM: its {'; its '.join(differing)}; start both from the same "
                "checkpoint and dtype"
            )


def served_model(model_config: Any, load_format: str, check_revision: bool) -> ServedModel:
    """Returns what vLLM serves, from its ModelConfig.

    Args:
        load_format: vLLM's; "dummy" weights have no revision but that of their config.

    Raises:
        ValueError: the model has no vision tower of the kind that Vitrine's encoders serve.
    """
    config = model_config.hf_config
    vision: Any = getattr(getattr(config, "thinker_config", config), "vision_config", None)  # Omni models: a thinker
    if not hasattr(vision, "out_hidden_size") or not hasattr(vision, "spatial_merge_size"):
        raise ValueError(
            f"VitrineConnector serves models with a vision tower that encoders have, not {config.model_type!r}: leave "
            "out --ec-transfer-config"
        )
    return ServedModel(
        model_type=config.model_type,
        out_hidden_size=vision.out_hidden_size,
        deepstack_visual_indexes=tuple(getattr(vision, "deepstack_visual_indexes", ())),
        dtype=str(model_config.dtype).removeprefix("torch."),
        patch_size=vision.patch_size,
        temporal_patch_size=vision.temporal_patch_size,
        merge_size=vision.spatial_merge_size,
        revision=_revision(model_config.model, load_format) if check_revision else "",
    )


def _revision(model: str, load_format: str) -> str:
    if not Path(model).is_dir():
        return ""
    try:
        return open_checkpoint(model, load_format="dummy" if load_format == "dummy" else "auto").revision
    except (CheckpointError, OSError) as error:
        _log.warning("the revision of %s is not compared with the encoders': %s", model, error)
        return ""
