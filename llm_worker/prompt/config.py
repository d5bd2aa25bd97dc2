"""The part of config.json that building a prompt needs."""

from __future__ import annotations

from dataclasses import dataclass

from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError
from vitrine_vlm.types import MediaKind


@dataclass(frozen=True)
class PromptConfig:
    """Special token ids, and the rules by which media tokens are placed.

    merge_size: patches merged into one token along each side.
    tokens_per_second: time positions per second of video; None where a video's timestamps are text.
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

    @property
    def timestamped_videos(self) -> bool:
        """Whether each temporal patch of a video is a run of placeholders of its own behind its time as text."""
        return self.tokens_per_second is None


def read_prompt_config(checkpoint: Checkpoint, *, timestamped_videos: bool) -> PromptConfig:
    """Reads the configuration of a checkpoint's prompts.

    Args:
        timestamped_videos: see `PromptConfig`; where False, config.json must have `tokens_per_second`.

    Raises:
        CheckpointError: config.json lacks a field.
    """
    config = checkpoint.config
    try:
        vision = config["vision_config"]
        return PromptConfig(
            image_token_id=config["image_token_id"],
            video_token_id=config["video_token_id"],
            vision_start_token_id=config["vision_start_token_id"],
            vision_end_token_id=config["vision_end_token_id"],
            merge_size=vision["spatial_merge_size"],
            tokens_per_second=None if timestamped_videos else vision["tokens_per_second"],
        )
    except KeyError as error:
        raise CheckpointError(f"config.json in {checkpoint.folder} has no {error.args[0]}") from error
