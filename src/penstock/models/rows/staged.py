"""Denoisers whose blocks cannot be dealt out over stages, and why."""

from __future__ import annotations

ENTANGLED: dict[str, str] = {
    "DiTTransformer2DModel": "its forward computes with weights of its first block",
    "HunyuanDiT2DModel": "its later blocks take what the first ones returned (`skip`), wherever these are",
}
"""By the name of the class, whose own code reaches past what blocks hand to each other."""
