"""transformers' vision towers with random weights, which the towers under test must equal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import AutoConfig, PretrainedConfig
from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VisionTransformerPretrainedModel
from transformers.models.qwen3_5.modeling_qwen3_5 import Qwen3_5VisionModel
from transformers.models.qwen3_5_moe.modeling_qwen3_5_moe import Qwen3_5MoeVisionModel
from transformers.models.qwen3_omni_moe.modeling_qwen3_omni_moe import Qwen3OmniMoeVisionEncoder
from transformers.models.qwen3_vl.modeling_qwen3_vl import Qwen3VLVisionModel
from transformers.models.qwen3_vl_moe.modeling_qwen3_vl_moe import Qwen3VLMoeVisionModel
from transformers.models.qwen4_exp.modeling_qwen4_exp import Qwen4ExpVisionModel

from vitrine_vlm.encoder_service.models.grids import GridTHW

REFERENCE_CLASSES: dict[str, type[Any]] = {
    "qwen3_vl": Qwen3VLVisionModel,
    "qwen3_vl_moe": Qwen3VLMoeVisionModel,
    "qwen2_5_vl": Qwen2_5_VisionTransformerPretrainedModel,
    "qwen3_5": Qwen3_5VisionModel,
    "qwen3_5_moe": Qwen3_5MoeVisionModel,
    "qwen4_exp": Qwen4ExpVisionModel,
    "qwen3_omni_moe": Qwen3OmniMoeVisionEncoder,
}


def reference_from_folder(folder: Path) -> Any:
    """The vision tower of a checkpoint folder, fp32."""
    config = AutoConfig.from_pretrained(folder)
    vision = getattr(config, "thinker_config", config).vision_config
    reference = REFERENCE_CLASSES[config.model_type]._from_config(vision, dtype=torch.float32)
    tensors = {
        name[name.index("visual.") + len("visual.") :]: tensor
        for path in folder.glob("*.safetensors")
        for name, tensor in load_file(path).items()
        if "visual." in name
    }
    reference.load_state_dict(tensors, strict=True)
    return reference.eval()


def random_reference(family: str, config: PretrainedConfig, seed: int = 0) -> Any:
    """A tower with weights drawn so that activations keep unit scale and every bias and norm matters."""
    with torch.device("meta"):
        reference = REFERENCE_CLASSES[family]._from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, parameter in reference.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if name.endswith("bias"):
            weights[name] = 0.1 * noise
        elif parameter.ndim == 1:
            weights[name] = 1 + 0.1 * noise
        else:
            weights[name] = noise * parameter[0].numel() ** -0.5
    # The rotary buffers are not in a checkpoint, so they are computed again off the meta device.
    rotary = type(reference.rotary_pos_emb)(config)
    reference.rotary_pos_emb = rotary
    reference.load_state_dict(weights, strict=True, assign=True)
    return reference.eval()


@torch.inference_mode()
def reference_rows(reference: Any, patches: torch.Tensor, grid_thw: list[GridTHW]) -> torch.Tensor:
    """Main embedding and deepstack layers side by side, as in a `VisionTower`'s rows."""
    output = reference(patches, torch.tensor(grid_thw))
    return torch.cat([output.pooler_output, *(output.get("deepstack_features") or [])], dim=1)


def random_patches(grid_thw: list[GridTHW], patch_width: int, seed: int = 0) -> torch.Tensor:
    num_patches = sum(t * h * w for t, h, w in grid_thw)
    return torch.randn(num_patches, patch_width, generator=torch.Generator().manual_seed(seed))
