"""Denoisers whose tokens cannot be split, and why."""

from __future__ import annotations

_CONVOLUTIONS = "its blocks mix neighbouring pixels by convolution"
_SANA = "its blocks mix neighbouring tokens by convolution, and its linear attention sums over all tokens"

REFUSED: dict[str, str] = {
    "LuminaNextDiT2DModel": "its attention scales scores by the number of tokens that a rank is given",
    "MotifVideoTransformer3DModel": "its last blocks take the tokens of the video in the place of those of the text",
    "NucleusMoEImageTransformer2DModel": "each of its experts chooses its tokens among all of them",
    "PriorTransformer": "its sequence is less than a hundred tokens",
    "QwenImage21Transformer2DModel": "its attention takes runs of tokens by their place in the whole sequence",
    "RFD4ProteinaTransformer": "its attention adds to the scores what it knows of pairs of tokens",
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA,
    "SanaWMTransformer3DModel": _SANA,
    "StableCascadeUNet": _CONVOLUTIONS,
    "UNet2DConditionModel": _CONVOLUTIONS,
    "UNet2DModel": _CONVOLUTIONS,
    "UNet3DConditionModel": _CONVOLUTIONS,
    "UNetMotionModel": _CONVOLUTIONS,
    "UNetSpatioTemporalConditionModel": _CONVOLUTIONS,
}
"""By the name of the class."""
