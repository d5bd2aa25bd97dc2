"""The part of the decoder that each rank of a tensor parallel worker holds.

Projections to heads or to the MLP's inner activations are cut by rows, those from them by columns, so that each rank
computes a summand of both outputs of a layer. Every expert is cut likewise. lm_head is cut by the vocabulary; norms,
embeddings and the experts' gate are whole on every rank.

Source: Megatron-LM (arXiv 1909.08053), section 3.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from vitrine_vlm.llm_worker.models.config import TextConfig
from vitrine_vlm.llm_worker.models.rank_group import RankGroup
from vitrine_vlm.model_loading.checkpoint import CheckpointError, TensorPart

_ROWS = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")
_GATE_UP = "experts.gate_up_proj"
_CUT_DIM = {
    **{f"{name}.{kind}": 0 for name in _ROWS for kind in ("weight", "bias")},
    "lm_head.weight": 0,
    "o_proj.weight": 1,
    "down_proj.weight": 1,
    _GATE_UP: 1,
    "experts.down_proj": 2,
}


def config_of_rank(config: TextConfig, num_ranks: int) -> TextConfig:
    """The dims of one rank's part. The vocabulary stays whole, as its embeddings do.

    Raises:
        CheckpointError: the model cannot be cut into so many equal parts.
    """
    cut = {
        "num_attention_heads": config.num_attention_heads,
        "num_key_value_heads": config.num_key_value_heads,
        "intermediate_size": config.intermediate_size,
        "vocab_size": config.vocab_size,
    }
    if config.moe is not None:
        cut["moe_intermediate_size"] = config.moe.moe_intermediate_size
    if odd := {name: size for name, size in cut.items() if size % num_ranks}:
        fitting = [n for n in range(1, config.num_key_value_heads + 1) if not any(size % n for size in cut.values())]
        raise CheckpointError(
            f"--tp {num_ranks} does not divide this model's {', '.join(f'{name} {odd[name]}' for name in odd)}: "
            f"it can be {' or '.join(map(str, fitting))}"
        )
    moe = config.moe
    return replace(
        config,
        num_attention_heads=config.num_attention_heads // num_ranks,
        num_key_value_heads=config.num_key_value_heads // num_ranks,
        intermediate_size=config.intermediate_size // num_ranks,
        moe=replace(moe, moe_intermediate_size=moe.moe_intermediate_size // num_ranks) if moe else None,
    )


def part_of_rank(
    name: str, stored_shape: Sequence[int], own_shape: Sequence[int], group: RankGroup
) -> TensorPart | None:
    """The part of a stored tensor that this rank reads; None for all of it.

    Args:
        own_shape: of the rank's parameter.

    Raises:
        CheckpointError: the stored tensor does not have the size of all ranks' parts together.
    """
    dim = next((dim for suffix, dim in _CUT_DIM.items() if name.endswith(suffix)), None)
    if dim is None or group.size == 1:
        return None
    own_size = own_shape[dim]
    whole = [*own_shape[:dim], own_size * group.size, *own_shape[dim + 1 :]]
    if list(stored_shape) != whole:
        # Released checkpoints store experts [num_experts, in, out].
        if ".experts." not in name or len(whole) != 3 or list(stored_shape) != [whole[0], whole[2], whole[1]]:
            raise CheckpointError(f"{name} has shape {tuple(stored_shape)}, config.json asks for {tuple(whole)}")
        dim = 3 - dim
    if name.endswith(_GATE_UP):  # gate and up are concatenated, and each is cut by itself
        half = own_size // 2
        starts = [group.rank * half, (group.size + group.rank) * half]
        return TensorPart(dim, tuple(slice(start, start + half) for start in starts))
    return TensorPart(dim, (slice(group.rank * own_size, (group.rank + 1) * own_size),))
