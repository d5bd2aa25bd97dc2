"""Loads the text decoder's weights of a checkpoint, and none of the vision tower."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import torch

from vitrine_vlm.gpu_kernels.fp8_weight import Fp8Weight
from vitrine_vlm.llm_worker.models.decoder import TextDecoder
from vitrine_vlm.llm_worker.models.kv_scales import kv_scale_names, set_kv_scales
from vitrine_vlm.llm_worker.models.quantization import projection_weights, set_fp8_weights
from vitrine_vlm.llm_worker.models.sharding import part_of_rank
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError, TensorPart
from vitrine_vlm.model_loading.dummy_weights import configured_dtype
from vitrine_vlm.model_loading.fp8_weights import fp8_format, read_weights, scale_names

# Prefixes of the decoder's tensors, the newest first; older checkpoints have them right below "model.".
_PREFIXES = ("model.language_model.", "language_model.model.", "model.")
_A_NORM = "layers.0.input_layernorm.weight"


def load_language_weights(
    decoder: TextDecoder,
    checkpoint: Checkpoint,
    device: torch.device,
    dtype: torch.dtype,
    on_progress: Callable[[int, int], None],
    *,
    keep_fp8: bool = False,
) -> None:
    """Fills the decoder, which was built on the meta device.

    Args:
        keep_fp8: whether linear layers whose weights are in FP8 become `Fp8Linear`; all others are dequantized.

    Raises:
        CheckpointError: a tensor of the decoder is missing, has another shape, or is unknown; or a quantization that is
            not supported.
    """
    fp8_format(checkpoint)
    names = checkpoint.tensor_names()
    prefix = next((each for each in _PREFIXES if f"{each}embed_tokens.weight" in names), None)
    if prefix is None:
        raise CheckpointError(f"no embed_tokens.weight below any of {_PREFIXES} in {checkpoint.folder}")
    parameters = dict(decoder.named_parameters())
    if decoder.config.tie_word_embeddings:
        parameters.pop("lm_head.weight", None)  # it is the weight of the embeddings
    targets = {
        stored: target
        for name, parameter in parameters.items()
        for stored, target in _targets(name, parameter.shape, prefix, names)
    }
    kv_scales = kv_scale_names(prefix, decoder.config.num_hidden_layers, names)
    scales = {scale for weight, scale in scale_names(names).items() if weight in targets} | kv_scales.keys()
    unknown = [
        name
        for name in names
        if name.startswith(prefix) and "visual." not in name and name not in targets and name not in scales
    ]
    if unknown:
        raise CheckpointError(f"{len(unknown)} tensors of the language model are unknown, first: {unknown[:3]}")

    def part_of_stored(stored: str, shape: tuple[int, ...]) -> TensorPart | None:
        return part_of_rank(stored, shape, targets[stored].shape, decoder.group)

    loaded: dict[str, torch.Tensor] = {}
    in_fp8: dict[str, Fp8Weight] = {}
    kept = projection_weights(decoder) if keep_fp8 else frozenset()
    weights = read_weights(checkpoint, list(targets), device, part_of_stored)
    for num_loaded, (stored, weight) in enumerate(weights, 1):
        target = targets[stored]
        on_progress(num_loaded, len(targets))
        if isinstance(weight, Fp8Weight) and target.name in kept:
            _as_shaped(stored, weight.values, target.shape)
            in_fp8[target.name] = weight
            continue
        tensor = weight.dequantized(dtype) if isinstance(weight, Fp8Weight) else weight.to(dtype)
        tensor = _as_shaped(stored, tensor, target.shape)
        if target.expert is None:
            loaded[target.name] = tensor
        else:
            experts = loaded.setdefault(target.name, tensor.new_empty(parameters[target.name].shape))
            experts[target.expert, target.rows] = tensor
    if decoder.config.tie_word_embeddings:
        # A view: this rank's part of the vocabulary.
        loaded["lm_head.weight"] = loaded["embed_tokens.weight"].chunk(decoder.group.size)[decoder.group.rank]
    set_fp8_weights(decoder, in_fp8, dtype)
    set_already = {name: tensor for name, tensor in decoder.state_dict().items() if not tensor.is_meta}
    decoder.load_state_dict(set_already | loaded, assign=True)
    set_kv_scales(decoder, checkpoint, kv_scales)


class _Target(NamedTuple):
    """Where a stored tensor goes: a parameter, or rows of one expert's part of it."""

    name: str
    shape: torch.Size
    expert: int | None = None
    rows: slice = slice(None)


def _targets(name: str, shape: torch.Size, prefix: str, stored_names: Collection[str]) -> Iterator[tuple[str, _Target]]:
    """The stored tensors that make a parameter: that of its name, or those of all experts one by one."""
    stored = name if name.startswith("lm_head.") else prefix + name
    experts, separator, kind = stored.rpartition(".experts.")
    if not separator or stored in stored_names or f"{experts}.experts.0.down_proj.weight" not in stored_names:
        yield stored, _Target(name, shape)
        return
    num_experts, num_rows, width = shape
    parts = {"down_proj": slice(num_rows)}
    if kind == "gate_up_proj":
        parts = {"gate_proj": slice(num_rows // 2), "up_proj": slice(num_rows // 2, num_rows)}
    for expert in range(num_experts):
        for part, rows in parts.items():
            part_shape = torch.Size((rows.stop - (rows.start or 0), width))
            yield f"{experts}.experts.{expert}.{part}.weight", _Target(name, part_shape, expert, rows)


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
    if ".experts." in name and tensor.ndim == 3 and tensor.transpose(1, 2).shape == shape:
        return tensor.transpose(1, 2).contiguous()
    raise CheckpointError(f"{name} has shape {tuple(tensor.shape)}, config.json asks for {tuple(shape)}")
