"""Seeded random checkpoints of the true architectures, for tests and benchmarks."""

from deploy.random_checkpoint.checkpoint import Family, save_random_checkpoint, small_config

__all__ = ["Family", "save_random_checkpoint", "small_config"]
