"""Rows of denoisers that make pictures."""

from __future__ import annotations

from penstock.models.rows.row import Row, StackRow

_FLUX = {"hidden_states": "img", "encoder_hidden_states": "txt", "image_rotary_emb": ("txt+img:0", "txt+img:0")}

ROWS: dict[str, Row] = {
    "FluxTransformer2DModel": Row(
        stacks=(
            StackRow("transformer_blocks", takes=_FLUX, gives=("txt", "img")),
            StackRow("single_transformer_blocks", takes=_FLUX, gives=("txt", "img")),
        ),
        attention={"attn": "txt+img"},
        residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    ),
}
