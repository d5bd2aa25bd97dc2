"""vLLM's Qwen2.5-VL, which also takes the times of videos with embeddings that come from elsewhere.

vLLM 0.30 to 0.33 takes a grid alone for them, and then positions every video as if its temporal patches were one second
apart. Source: vLLM 0.32, vllm/model_executor/models/qwen2_5_vl.py and qwen2_vl.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar

import torch
from vllm.model_executor.models import qwen2_5_vl, qwen2_vl
from vllm.multimodal import MULTIMODAL_REGISTRY
from vllm.multimodal.inputs import MultiModalFieldConfig
from vllm.multimodal.parse import DictEmbeddingItems

_GRIDS, _INTERVALS = "video_grid_thw", "second_per_grid_ts"


class _DataParser(qwen2_vl.Qwen2VLMultiModalDataParser):
    """
    Args:
        max_duration_s: of all videos of a request together.
    """

    embedding_fields: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        **qwen2_vl.Qwen2VLMultiModalDataParser.embedding_fields,
        "video": {**qwen2_vl.Qwen2VLMultiModalDataParser.embedding_fields["video"], _INTERVALS: "metadata"},
    }

    def __init__(self, *args: Any, max_duration_s: float, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._max_duration_s = max_duration_s

    def _parse_video_data(self, data: Any) -> Any:
        if not isinstance(data, dict):
            return super()._parse_video_data(data)
        required, optional = self.embedding_field_sets("video")
        if required <= data.keys():
            data = {**data, _INTERVALS: self._intervals(data)}
        return DictEmbeddingItems(
            data, modality="video", required_fields=required, optional_fields=optional, fields_factory=self._fields
        )

    def _intervals(self, data: Mapping[str, torch.Tensor]) -> torch.Tensor:
        """Returns the intervals in the precision of vLLM's processor, as positions are rounded down.

        Raises:
            ValueError: positions would be beyond vLLM's table of them, which ends the engine.
        """
        grids, intervals = data[_GRIDS], data[_INTERVALS]
        # vLLM merges those of several videos to one tensor, if they have the same form.
        if not (torch.is_tensor(grids) and torch.is_tensor(intervals) and grids.shape == (intervals.numel(), 3)):
            raise ValueError(f"each video needs a {_GRIDS} of three numbers and a {_INTERVALS} of one")
        intervals = intervals.to(torch.float32)
        durations_s = grids[:, 0] * intervals.flatten()
        if not bool((intervals >= 0).all()) or not float(durations_s.sum()) <= self._max_duration_s:
            raise ValueError(
                f"{_INTERVALS} {intervals.flatten().tolist()}: videos of {durations_s.tolist()} s; they must be "
                f"{self._max_duration_s:g} s at most together"
            )
        return intervals

    def _fields(self, data: Mapping[str, torch.Tensor]) -> Mapping[str, MultiModalFieldConfig]:
        of_vllm = qwen2_vl._create_qwen2vl_field_factory(self._spatial_merge_size)
        return {**of_vllm(data), _INTERVALS: MultiModalFieldConfig.batched("video", keep_on_cpu=True)}


class _ProcessingInfo(qwen2_5_vl.Qwen2_5_VLProcessingInfo):
    def get_data_parser(self) -> Any:
        of_vllm = super().get_data_parser()
        if not of_vllm.allow_missing_mm_embeddings:  # no connector is used
            return of_vllm
        config = self.get_hf_config()
        # vLLM's table has four times as many positions as the model (`MRotaryEmbedding`); the text takes one part.
        max_positions = 3 * config.get_text_config().max_position_embeddings
        return _DataParser(
            config.vision_config.spatial_merge_size,
            video_needs_metadata=of_vllm.video_needs_metadata,
            expected_hidden_size=of_vllm.expected_hidden_size,
            allow_missing_mm_embeddings=True,
            max_duration_s=max_positions / getattr(config.vision_config, "tokens_per_second", 1.0),
        )


@MULTIMODAL_REGISTRY.register_processor(
    qwen2_5_vl.Qwen2_5_VLMultiModalProcessor,
    info=_ProcessingInfo,
    dummy_inputs=qwen2_5_vl.Qwen2_5_VLDummyInputsBuilder,
)
class Qwen2_5_VLForConditionalGeneration(qwen2_5_vl.Qwen2_5_VLForConditionalGeneration):
    """Its processor is not vLLM's; the model is."""
