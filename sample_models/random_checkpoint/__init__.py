"""Seeded random checkpoints of the true architectures, for tests and benchmarks."""

from vitrine_vlm.sample_models.random_checkpoint.checkpoint import save_random_checkpoint, save_weightless_checkpoint
from vitrine_vlm.sample_models.random_checkpoint.fp8_checkpoint import Fp8Layout, save_fp8_checkpoint
from vitrine_vlm.sample_models.random_checkpoint.small_configs import Family, small_config, special_token_ids

__all__ = [
    "Family",
    "Fp8Layout",
    "save_fp8_checkpoint",
    "save_random_checkpoint",
    "save_weightless_checkpoint",
    "small_config",
    "special_token_ids",
]
