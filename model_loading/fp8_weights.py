"""Reads checkpoints that come in FP8: which of their tensors are, and with which scales.

Two formats: `fp8`, that of publishers' own models, with a scale a block of 128 x 128 (`X.weight_scale_inv` beside
`X.weight`), and `compressed-tensors`, mostly with a scale an output channel (`X.weight_scale`). Which tensors are in
FP8 is read from their scales, and must agree with config.json. Activations have no scales: they are quantized while
serving, if at all.

Source: transformers 5.23 `utils/quantization_config.py` (FineGrainedFP8Config), `integrations/finegrained_fp8.py`
(Fp8Dequantize); compressed-tensors 0.20 `quantization/quant_args.py` and `quant_config.py`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from vitrine_vlm.gpu_kernels.fp8_weight import FP8, Fp8Weight
from vitrine_vlm.model_loading.checkpoint import Checkpoint, CheckpointError, ChoosePart, TensorPart

_SUFFIXES = ("_scale_inv", "_scale")


@dataclass(frozen=True)
class Fp8Format:
    """What config.json says about FP8 weights.

    suffix: of the names of scales.
    block: outputs and inputs of a block; None where weights have a scale a channel or one in all.
    ignored: modules that are not in FP8, by name or, behind "re:", by a pattern.
    """

    suffix: str
    block: tuple[int, int] | None
    ignored: tuple[str, ...]

    def ignores(self, module: str) -> bool:
        """Whether the module, or one that it is part of, is named as not in FP8."""
        return any(
            re.match(name[3:], module) is not None
            if name.startswith("re:")
            else module == name or module.startswith(f"{name}.")
            for name in self.ignored
        )


def fp8_format(checkpoint: Checkpoint) -> Fp8Format | None:
    """Reads config.json's `quantization_config`; None where there is none.

    Raises:
        CheckpointError: another kind of quantization.
    """
    stated = checkpoint.config.get("quantization_config")
    if stated is None:
        return None
    method = stated.get("quant_method")
    if method == "fp8":
        return _fine_grained(stated)
    if method == "compressed-tensors":
        return _compressed_tensors(stated)
    raise CheckpointError(
        f"quantization_config has quant_method {method!r}; supported are 'fp8' and 'compressed-tensors' in FP8"
    )


def scale_names(names: Iterable[str]) -> dict[str, str]:
    """The names of scales among a checkpoint's tensors, by the names of their weights."""
    known = set(names)
    pairs = ((name.removesuffix(suffix), name) for suffix in _SUFFIXES for name in known if name.endswith(suffix))
    return {weight: scale for weight, scale in pairs if weight in known}


def read_weights(
    checkpoint: Checkpoint,
    names: list[str],
    device: str | torch.device = "cpu",
    choose_part: ChoosePart = lambda name, shape: None,
) -> Iterator[tuple[str, torch.Tensor | Fp8Weight]]:
    """As `Checkpoint.read_tensors`, with the scales of weights that are in FP8.

    Raises:
        CheckpointError: see there; scales that are missing or not as config.json says, and parts that begin or end
            inside a block.
    """
    scaled = scale_names(checkpoint.tensor_names())
    own = {name: scaled[name] for name in names if name in scaled}
    form = _checked_format(checkpoint, own) if own else None
    scales = dict(checkpoint.read_tensors(list(own.values()), device)) if own else {}
    parts: dict[str, TensorPart | None] = {}
    shapes: dict[str, tuple[int, ...]] = {}

    def noted_part(name: str, shape: tuple[int, ...]) -> TensorPart | None:
        parts[name], shapes[name] = choose_part(name, shape), shape
        return parts[name]

    for name, tensor in checkpoint.read_tensors(names, device, noted_part):
        if (tensor.dtype == FP8) != (name in own):
            raise CheckpointError(
                f"{name} is stored as {tensor.dtype} {'with' if name in own else 'without'} a scale; "
                f"a weight is in FP8 if it is {FP8} and has one"
            )
        if form is None or name not in own:
            yield name, tensor
            continue
        scale, block = _grid(own[name], scales[own[name]].float(), shapes[name], form)
        yield name, Fp8Weight(tensor, _part_of_scale(name, scale, block, shapes[name], parts[name]), block)


def _fine_grained(stated: Mapping[str, Any]) -> Fp8Format:
    if (scheme := stated.get("activation_scheme", "dynamic")) != "dynamic":
        raise CheckpointError(f"quantization_config has activation_scheme {scheme!r}, only 'dynamic' is supported")
    if (fmt := stated.get("fmt", "e4m3")) != "e4m3":
        raise CheckpointError(f"quantization_config has fmt {fmt!r}, only 'e4m3' is supported")
    ignored = stated.get("modules_to_not_convert") or stated.get("ignored_layers") or ()
    return Fp8Format("_scale_inv", _block(stated.get("weight_block_size")), tuple(ignored))


def _compressed_tensors(stated: Mapping[str, Any]) -> Fp8Format:
    blocks = set()
    for name, group in (stated.get("config_groups") or {}).items():
        weights, activations = group.get("weights") or {}, group.get("input_activations")
        if (weights.get("type"), weights.get("num_bits")) != ("float", 8) or not weights.get("symmetric", True):
            raise CheckpointError(
                f"quantization_config's {name} has {weights.get('num_bits')}-bit weights of type "
                f"{weights.get('type')!r}; of compressed-tensors' formats symmetric 8-bit floats are supported"
            )
        if activations is not None and activations.get("dynamic") is not True:
            raise CheckpointError(
                f"quantization_config's {name} has static activations, only dynamic ones are supported"
            )
        blocks.add(_block(weights.get("block_structure")) if weights.get("strategy") == "block" else None)
    if len(blocks) != 1:
        raise CheckpointError(f"quantization_config has config_groups with {len(blocks)} block sizes, expected one")
    return Fp8Format("_scale", blocks.pop(), tuple(stated.get("ignore") or ()))


def _block(size: Any) -> tuple[int, int] | None:
    if size is None:
        return None
    if not (isinstance(size, list) and len(size) == 2 and all(isinstance(each, int) and each > 0 for each in size)):
        raise CheckpointError(f"quantization_config has blocks of {size!r}, expected two positive numbers")
    return size[0], size[1]


def _checked_format(checkpoint: Checkpoint, own: Mapping[str, str]) -> Fp8Format:
    form = fp8_format(checkpoint)
    name, scale = next(iter(own.items()))
    if form is None:
        raise CheckpointError(f"{name} has a scale, {scale}, but config.json has no quantization_config")
    if other := [scale for weight, scale in own.items() if scale != weight + form.suffix]:
        raise CheckpointError(f"{other[0]} is no scale of config.json's quantization_config: expected *{form.suffix}")
    if ignored := [name for name in own if form.ignores(name.removesuffix(".weight"))]:
        raise CheckpointError(
            f"{len(ignored)} weights have scales, but config.json says that they are not in FP8, first: {ignored[:3]}"
        )
    return form


def _grid(
    name: str, scale: torch.Tensor, shape: tuple[int, ...], form: Fp8Format
) -> tuple[torch.Tensor, tuple[int, int]]:
    """A stored scale as a grid, and what a block of it is: one scale in all is one a channel."""
    *experts, rows, columns = shape
    if form.block is not None:
        block = form.block
        expected = [*experts, -(-rows // block[0]), -(-columns // block[1])]
    else:
        block, expected = (1, columns), [*experts, rows, 1]
        if scale.numel() == 1:
            scale = scale.reshape([1] * len(expected)).expand(expected)
    if list(scale.shape) != expected:
        raise CheckpointError(f"{name} has shape {tuple(scale.shape)}, config.json asks for {tuple(expected)}")
    return scale, block


def _part_of_scale(
    name: str, scale: torch.Tensor, block: tuple[int, int], shape: tuple[int, ...], part: TensorPart | None
) -> torch.Tensor:
    """The scales of a part of a weight of this shape."""
    if part is None or scale.shape[part.dim] == 1:
        return scale.contiguous()
    size, end = block[part.dim - scale.ndim], shape[part.dim]
    if any(each.start % size or (each.stop % size and each.stop != end) for each in part.ranges):
        cuts = ", ".join(f"{each.start} to {each.stop}" for each in part.ranges)
        raise CheckpointError(f"{name} is cut inside its blocks of {size}, which share a scale, to {cuts}: lower --tp")
    cut = [
        scale.narrow(part.dim, each.start // size, -(-each.stop // size) - each.start // size) for each in part.ranges
    ]
    return torch.cat(cut, part.dim)
