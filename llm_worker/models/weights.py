"""Loads the text decoder's weights of a checkpoint, and none of the vision tower."""

from __future__ import annotations

from collections.abc import Callable

import torch

from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.sharding import part_of_rank
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError, TensorPart
from vitrine_vlm.model_loading.dummy_weights import configured_dtype

# Prefixes of the decoder's tensors, the newest first; older checkpoints have them right below "model.".
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_A_NORM = "layers.0.input_layernorm.weight"


def load_language_weights(
    decoder: TextDecoder,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
) -> None:
    """Fills the decoder, which was built on the meta device.

    Raises:
        CheckpointError: a tensor of the decoder is missing, has another shape, or is unknown.
    """
    names = checkpoint.tensor_names()
    prefix = next((each for each in _PREFIXES if f"{each}embed_tokens.weight" in names), None)
    if prefix is None:
        raise CheckpointError(f"no embed_tokens.weight below any of {_PREFIXES} in {checkpoint.folder}")
    parameters = dict(decoder.named_parameters())
    if decoder.config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)  # it is the weight of the embeddings
    stored_name = {name: name if name.startswith("lm_head.") else prefix + name for name in parameters}
    unknown = [
        name for name in names if name.startswith(prefix) and "visual." not in name and name not in stored_name.values()
    ]
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors of the language model are unknown, first: {unknown[:3]}")
    own_name = {stored: name for name, stored in stored_name.items()}

    def part_of_stored(stored: str, shape: tuple[int, ...]) -> TensorPart | None:
        name = own_name[stored]
        return part_of_rank(name, shape, parameters[name].shape, decoder.group)

    loaded: dict[str, torch.Tensor] = {}
    for stored, tensor in checkpoint.read_tensors(list(own_name), device, part_of_stored):
        name = own_name[stored]
        loaded[name] = _as_shaped(stored, tensor, parameters[name].shape).to(dtype)
        on_progress(len(loaded), len(own_name))
    if decoder.config.tie_word_embeddings:
        # A view: this rank's part of the vocabulary.
        loaded["lm_head.weight"] = loaded["embed_tokens.weight"].chunk(decoder.group.size)[decoder.group.rank]
    decoder.load_state_dict(loaded, assign=True)


def stored_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The element type of the decoder's weights on disk, as one norm's weight has it; for dummies that of config.json.

    Raises:
        CheckpointError: there is no such weight, as in models without a text decoder.
    """
    if checkpoint.load_format == "dummy":
        return configured_dtype(checkpoint)
    names = [name for name in checkpoint.tensor_names() if name.endswith(_A_NORM)]
    if not names:
        model_type = checkpoint.config.get("model_type")
        raise CheckpointError(
            f"no {_A_NORM} in {checkpoint.folder} (model_type {model_type!r}): these are not the weights of a text "
            "decoder"
        )
    return next(checkpoint.read_tensors(names[:1]))[1].dtype


def _as_shaped(name: str, tensor: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    if tensor.shape == shape:
        return tensor
    # Released MoE checkpoints store experts [num_experts, in, out]; transformers 5 writes [num_experts, out, in].
    if ".experts." in name and tensor.transpose(1, 2).shape == shape:
        return tensor.transpose(1, 2).contiguous()
    raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}")
