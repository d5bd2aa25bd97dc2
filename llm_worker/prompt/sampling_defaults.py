"""The sampling parameters of a checkpoint's generation_config.json, for requests that set none."""

from __future__ import annotations

from dataclasses import dataclass

from vitrine_vlm.model_loading.checkpoint import Checkpoint


@dataclass(frozen=True)
class SamplingDefaults:
    """eos_token_ids: tokens that end a generation; the others are as in SamplingParams."""

    temperature: float
    top_p: float
    top_k: int
    eos_token_ids: frozenset[int]
    repetition_penalty: float = 1.0
    min_p: float = 0.0

    @classmethod
    def from_checkpoint(cls, checkpoint: Checkpoint) -> SamplingDefaults:
        generation = checkpoint.json("generation_config.json")
        config = checkpoint.config
        eos = generation.get("eos_token_id")
        if eos is None:
            eos = (config.get("text_config") or config).get("eos_token_id")
        ids = eos if isinstance(eos, list) else [] if eos is None else [eos]
        # transformers decodes greedily where the file does not say do_sample.
        sampled = bool(generation.get("do_sample", False))
        return cls(
            temperature=float(generation.get("temperature") or 1.0) if sampled else 0.0,
            top_p=float(generation.get("top_p") or 1.0),
            top_k=int(generation.get("top_k") or 0),
            eos_token_ids=frozenset(ids),
            repetition_penalty=float(generation.get("repetition_penalty") or 1.0),
            min_p=float(generation.get("min_p") or 0.0),
        )
