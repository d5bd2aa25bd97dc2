"""One pass of transformers' Qwen3-VL over a packed batch."""

from __future__ import annotations

import torch
from transformers import Qwen3VLForConditionalGeneration

from vitrine_vlm.sample_models.tiny_vlm.training.examples import NO_TARGET, Batch

_PIXEL_MIDDLE = 127.5  # mean and standard deviation are 0.5 for pixels scaled to 0..1


def answer_logits(
    model: Qwen3VLForConditionalGeneration,
    batch: Batch,
    *,
    drop_main: float = 0.0,
    zero_deepstack: bool = False,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Runs the model and returns the logits of the answers.

    Args:
        drop_main: the share of examples, chosen at random, whose media have only their deepstack rows.
        zero_deepstack: whether all media have only their main rows.

    Returns:
        The logits [T, vocab] at the T positions whose next token is part of an answer, and these tokens [T].
    """
    config = model.config
    is_media = (batch.token_ids == config.image_token_id) | (batch.token_ids == config.video_token_id)
    rows, deepstack = _media_rows(model, batch, is_media)
    lengths = batch.cu_seqlens[1:] - batch.cu_seqlens[:-1]
    if drop_main:
        kept = torch.rand(len(lengths), device=rows.device) >= drop_main
        rows = rows * kept.repeat_interleave(lengths, output_size=len(is_media))[is_media, None]
    if zero_deepstack:
        deepstack = [torch.zeros_like(layer) for layer in deepstack]
    embeds = model.get_input_embeddings()(batch.token_ids)
    embeds = embeds.masked_scatter(is_media[:, None], rows.to(embeds.dtype))
    hidden = model.model.language_model(
        inputs_embeds=embeds[None],
        position_ids=batch.positions_3N[:, None],
        visual_pos_masks=is_media[None],
        deepstack_visual_embeds=deepstack,
        use_cache=False,
        cu_seq_lens_q=batch.cu_seqlens,
        max_length_q=int(lengths.max()),
    ).last_hidden_state[0]
    wanted = batch.targets != NO_TARGET
    return model.lm_head(hidden[wanted]).float(), batch.targets[wanted]


def _media_rows(
    model: Qwen3VLForConditionalGeneration, batch: Batch, is_media: torch.Tensor
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Returns the main rows of all media in the order of their tokens, and the rows of each deepstack layer."""
    patches = [batch.clips]
    if len(batch.pictures):
        # A picture's patch has its only frame twice.
        patches.insert(0, batch.pictures.unflatten(1, (3, 1, -1)).expand(-1, -1, 2, -1).flatten(1))
    pixels = torch.cat([each for each in patches if len(each)]).float().sub_(_PIXEL_MIDDLE).div_(_PIXEL_MIDDLE)
    grid_thw = torch.cat([batch.picture_grids, batch.clip_grids])
    output = model.model.visual(pixels, grid_thw=grid_thw, position_ids=batch.patch_positions, return_dict=True)
    # The tower's input has pictures first, then clips; the tokens are in the order of the prompts.
    is_clip = batch.token_ids[is_media] == model.config.video_token_id
    order = torch.empty_like(is_clip, dtype=torch.int64)
    num_picture_rows = int((~is_clip).sum())
    order[~is_clip] = torch.arange(num_picture_rows, device=order.device)
    order[is_clip] = torch.arange(num_picture_rows, len(order), device=order.device)
    return output.pooler_output[order], [layer[order] for layer in output.deepstack_features]
