"""What vision towers are made of, in plain torch: packed patches in, embedding rows out."""

from vitrine_vlm.encoder_service.models.tower import PlainTower, VisionTower

__all__ = ["PlainTower", "VisionTower"]
