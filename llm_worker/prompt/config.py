"""What building a prompt needs to know of config.json."""

from __future__ import annotations

from dataclasses import dataclass

from embedding_transport.checkpoint import Checkpoint, CheckpointError
from embedding_transport.types import MediaKind


@dataclass(frozen=True)
class PromptConfig:
    """Special token ids, and how media tokens are placed.

    merge_size: patches merged into one token along each side.
    tokens_per_second: Qwen2.5-VL's time positions per second of video; None for Qwen3-VL, whose timestamps are text.
    """

    image_token_id: int
    video_token_id: int
    vision_start_token_id: int
    vision_end_token_id: int
    merge_size: int
    tokens_per_second: float | None

    @property
    def placeholder_ids(self) -> dict[MediaKind, int]:
        return {"image": self.image_token_id, "video": self.video_token_id}

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> PromptConfig:
        """
        Raises:
            CheckpointError: config.json lacks a field.
        """
        config = checkpoint.config
        try:
            vision = config["vision_config"]
            return cls(
                image_token_id=config["image_token_id"],
                video_token_id=config["video_token_id"],
                vision_start_token_id=config["vision_start_token_id"],
                vision_end_token_id=config["vision_end_token_id"],
                merge_size=vision["spatial_merge_size"],
                tokens_per_second=vision["tokens_per_second"] if config["model_type"] == "qwen2_5_vl" else None,
            )
        except KeyError as error:
            raise CheckpointError(f"config.json in {checkpoint.folder} has no {error.args[0]}") from error
