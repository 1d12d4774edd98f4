"""Rows of denoisers that make video, with or without sound."""

from __future__ import annotations

from penstock.models.rows.row import Row, StackRow

ROWS: dict[str, Row] = {
    "WanTransformer3DModel": Row(
        stacks=(
            StackRow(
                "blocks",
                takes={"hidden_states": "img", "temb": "img:1/4", "rotary_emb": ("img", "img")},
                gives=("img",),
            ),
        ),
        attention={"attn1": "img"},  # attn2 looks at the text, which is whole on every rank
    ),
}
