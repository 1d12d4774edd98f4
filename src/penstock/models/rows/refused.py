"""Denoisers whose tokens cannot be split, and why."""

from __future__ import annotations

_CONVOLUTIONS = "its blocks mix neighbouring pixels by convolution"
_SANA = "its blocks mix neighbouring tokens by convolution, and its linear attention sums over all tokens"

REFUSED: dict[str, str] = {
    "AceStepTransformer1DModel": "its sliding window is counted in this rank's tokens by some attention backends",
    "AnyFlowFARTransformer3DModel": "its frames see those before them, through a cache",
    "Kandinsky6SRTransformer3DModel": "its sparse attention compares all tokens before it chooses some",
    "LuminaNextDiT2DModel": "its attention scales scores by the number of tokens that a rank is given",
    "MotifVideoTransformer3DModel": "its last blocks take the tokens of the video in the place of those of the text",
    "NucleusMoEImageTransformer2DModel": "each of its experts chooses its tokens among all of them",
    "PriorTransformer": "its sequence is less than a hundred tokens",
    "QwenImage21Transformer2DModel": "its attention takes runs of tokens by their place in the whole sequence",
    "RFD4ProteinaTransformer": "its attention adds to the scores what it knows of pairs of tokens",
    "SanaTransformer2DModel": _SANA,
    "SanaVideoTransformer3DModel": _SANA,
    "SanaWMLTX2RefinerTransformer3DModel": "it attends to cached keys of earlier chunks",
    "SanaWMTransformer3DModel": _SANA,
    "StableCascadeUNet": _CONVOLUTIONS,
    "Transformer2DModel": "its second attention looks at the text or at its own tokens, as a model is configured",
    "UNet2DConditionModel": _CONVOLUTIONS,
    "UNet2DModel": _CONVOLUTIONS,
    "UNet3DConditionModel": _CONVOLUTIONS,
    "UNetControlNetXSModel": _CONVOLUTIONS,
    "UNetMotionModel": _CONVOLUTIONS,
    "UNetSpatioTemporalConditionModel": _CONVOLUTIONS,
    "WanAnimate2Transformer3DModel": "its attention packs frames into blocks and reads cached keys",
}
"""By the name of the class."""
