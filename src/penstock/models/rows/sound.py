"""Rows of denoisers that make sound alone."""

from __future__ import annotations

from penstock.models.rows.row import Row, StackRow

ROWS: dict[str, Row] = {
    "StableAudioDiTModel": Row(
        stacks=(
            StackRow(
                "transformer_blocks",
                {"hidden_states": "aud", "attention_mask": "aud", "rotary_embedding": "aud:0"},
                ("aud",),
            ),
        ),
        attention={"attn1": "aud"},
    ),
    "StableAudio3DiTModel": Row(
        stacks=(StackRow("transformer_blocks", {"hidden_states": "aud", "rope": "aud:0"}, ("aud",)),),
        attention={"self_attn": "aud"},
        refuses={"local_add_cond": "its tokens are shifted against those of the sound"},
    ),
    "LongCatAudioDiTTransformer": Row(
        stacks=(StackRow("blocks", {"hidden_states": "aud", "mask": "aud", "rope": "aud:0"}, ("aud",)),),
        attention={"self_attn": "aud"},
    ),
    "MiniMaxMusic3Transformer1DModel": Row(
        stacks=(StackRow("transformer_blocks", {"hidden_states": "aud", "rotary_emb": "aud:0"}, ("aud",)),),
        attention={"attn": "aud"},
    ),
}
