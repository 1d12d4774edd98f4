"""Tiny text encoders: real transformers classes, two layers of width 32 where the pipeline allows it.

Each builder takes the tokenizer it will read from: it gives the size of the embedding table and the special
tokens.
"""

from __future__ import annotations

from typing import Any

from torch import nn

WIDTH = 32
_HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}


def clip(tokenizer: Any, projected: bool = False, activation: str = "quick_gelu") -> nn.Module:
    """Returns a CLIP text model.

    Args:
        tokenizer: The tokenizer it reads from.
        projected: Whether it ends in a projection, as the encoders of SDXL's and SD3's second kind do.
        activation: `hidden_act` of the class.

    Returns:
        The model.
    """
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=48,
        projection_dim=WIDTH,
        num_hidden_layers=3,
        num_attention_heads=4,
        max_position_embeddings=tokenizer.model_max_length,
        hidden_act=activation,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return CLIPTextModelWithProjection(config) if projected else CLIPTextModel(config)


def t5(tokenizer: Any, width: int = WIDTH) -> nn.Module:
    """Returns a T5 encoder; `shared` and `encoder.embed_tokens` are one tensor.

    Args:
        tokenizer: The tokenizer it reads from.
        width: Its hidden size.

    Returns:
        The model.
    """
    from transformers import T5Config, T5EncoderModel

    return T5EncoderModel(T5Config(**(_t5_figures(tokenizer) | {"d_model": width})))


def umt5(tokenizer: Any) -> nn.Module:
    """Returns a UMT5 encoder: as T5, with position biases in every layer."""
    from transformers import UMT5Config, UMT5EncoderModel

    return UMT5EncoderModel(UMT5Config(**_t5_figures(tokenizer)))


def _t5_figures(tokenizer: Any) -> dict[str, Any]:
    """Returns the figures shared by the encoders of the T5 family."""
    return {
        "vocab_size": len(tokenizer),
        "d_model": WIDTH,
        "d_kv": 8,
        "d_ff": 48,
        "num_layers": 2,
        "num_heads": 4,
        "feed_forward_proj": "gated-gelu",
        "relative_attention_num_buckets": 8,
        "is_encoder_decoder": False,
    }


def qwen25_vl(tokenizer: Any) -> nn.Module:
    """Returns a Qwen 2.5 VL model, pictures and text (Qwen-Image)."""
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    vision = {
        "depth": 2,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_heads": 4,
        "out_hidden_size": WIDTH,
        "fullatt_block_indexes": [1],
        "window_size": 56,
    }
    config = Qwen2_5_VLConfig(
        text_config=_qwen25_figures(tokenizer),
        vision_config=vision,
        image_token_id=tokenizer.convert_tokens_to_ids("<|image_pad|>"),
    )
    return Qwen2_5_VLForConditionalGeneration(config)


def qwen25_vl_text(tokenizer: Any) -> nn.Module:
    """Returns only the text half of a Qwen 2.5 VL model (HunyuanVideo 1.5)."""
    from transformers import Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

    return Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**_qwen25_figures(tokenizer)))


def _qwen25_figures(tokenizer: Any) -> dict[str, Any]:
    """Returns the figures of the text half of a Qwen 2.5 VL model."""
    return {
        **_special_tokens(tokenizer),
        **_HEADS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]},
    }


def qwen3(tokenizer: Any, layers: int = 3, width: int = WIDTH) -> nn.Module:
    """Returns a Qwen 3 language model.

    Args:
        tokenizer: The tokenizer it reads from.
        layers: How many layers; Flux 2 Klein reads the outputs of layers 9, 18 and 27.
        width: Its hidden size.

    Returns:
        The model, its output head tied to its embedding table.
    """
    from transformers import Qwen3Config, Qwen3ForCausalLM

    config = Qwen3Config(
        **_special_tokens(tokenizer),
        **_HEADS,
        hidden_size=width,
        intermediate_size=48,
        num_hidden_layers=layers,
        head_dim=8,
        tie_word_embeddings=True,
    )
    return Qwen3ForCausalLM(config)


def mistral3(tokenizer: Any, layers: int = 30, width: int = 16) -> nn.Module:
    """Returns a Mistral 3 model, pictures and text.

    Args:
        tokenizer: The tokenizer it reads from.
        layers: How many layers; Flux 2 reads the outputs of layers 10, 20 and 30.
        width: Its hidden size.

    Returns:
        The model.
    """
    from transformers import (
        Mistral3Config,
        Mistral3ForConditionalGeneration,
        MistralConfig,
        PixtralVisionConfig,
    )

    text = MistralConfig(
        **_special_tokens(tokenizer),
        **_HEADS,
        hidden_size=width,
        intermediate_size=24,
        num_hidden_layers=layers,
        head_dim=8,
    )
    vision = PixtralVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    image_token = tokenizer.convert_tokens_to_ids("[IMG]")
    config = Mistral3Config(text_config=text, vision_config=vision, image_token_index=image_token)
    return Mistral3ForConditionalGeneration(config)


def gemma2(tokenizer: Any) -> nn.Module:
    """Returns a Gemma 2 model: soft-capped scores, every other layer with a sliding window."""
    from transformers import Gemma2Config, Gemma2Model

    return Gemma2Model(Gemma2Config(**_gemma_figures(tokenizer)))


def gemma3(tokenizer: Any) -> nn.Module:
    """Returns a Gemma 3 model, pictures and text (LTX-2)."""
    from transformers import (
        Gemma3Config,
        Gemma3ForConditionalGeneration,
        Gemma3TextConfig,
        SiglipVisionConfig,
    )

    text = Gemma3TextConfig(**_gemma_figures(tokenizer))
    vision = SiglipVisionConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        image_size=32,
        patch_size=8,
    )
    return Gemma3ForConditionalGeneration(Gemma3Config(text_config=text, vision_config=vision, mm_tokens_per_image=4))


def _gemma_figures(tokenizer: Any) -> dict[str, Any]:
    """Returns the figures shared by the Gemma models."""
    return {
        **_special_tokens(tokenizer),
        **_HEADS,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 3,
        "head_dim": 8,
        "query_pre_attn_scalar": 8,
        "sliding_window": 16,
    }


def _special_tokens(tokenizer: Any) -> dict[str, Any]:
    """Returns the size of the vocabulary and its special tokens, as language model configs want them."""
    return {
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
