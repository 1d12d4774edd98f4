"""The models of the shard benchmark, what they are given, and the checkpoints that hold them.

    python benchmarks/shard_cases.py FOLDER CASE [--small]    (CASE: flux, ltx2, or pipeline)

Random weights, the same in every process. Knows neither ranks nor how weights are sharded.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline, FluxTransformer2DModel, LTX2VideoTransformer3DModel
from parallel_cases import BF16, HEAD_DIM, TEXT_WIDTH, Case, Denoising, build_model, cast, inputs_of

CASES = {
    "flux": Case("flux", BF16, (1, 16, 24), text=128, heads=4, layers=(8, 24)),  # a block is a small part of it
    "ltx2": Case("ltx2", BF16, (1, 12, 16), text=64, heads=3, layers=(48,)),  # as many blocks as the real one
}
SMALL = {
    "flux": replace(CASES["flux"], size=(1, 8, 8), text=16, heads=2, layers=(4, 12)),
    "ltx2": replace(CASES["ltx2"], size=(1, 4, 4), text=8, heads=1, layers=(12,)),
}
LTX_CHANNELS = 128
AUDIO_HEAD_DIM = 64
AUDIO_TOKENS = 32
PIPELINE_HEADS, PIPELINE_LAYERS = 24, (6, 44)  # of the demo's heads, 32 wide: 1 GiB in bfloat16
SMALL_PIPELINE_HEADS, SMALL_PIPELINE_LAYERS = 8, (6, 44)  # a ninth


def case_of(name: str, is_small: bool) -> Case:
    """A model's size."""
    return (SMALL if is_small else CASES)[name]


def build(case: Case) -> Any:
    """The model, with random weights that are the same in every process."""
    if case.model != "ltx2":
        return build_model(case)
    torch.manual_seed(0)
    model = LTX2VideoTransformer3DModel(
        in_channels=LTX_CHANNELS,
        out_channels=LTX_CHANNELS,
        num_attention_heads=case.heads,
        attention_head_dim=HEAD_DIM,
        cross_attention_dim=case.width,
        audio_in_channels=LTX_CHANNELS,
        audio_out_channels=LTX_CHANNELS,
        audio_num_attention_heads=case.heads,
        audio_attention_head_dim=AUDIO_HEAD_DIM,
        audio_cross_attention_dim=case.heads * AUDIO_HEAD_DIM,
        num_layers=case.layers[0],
        caption_channels=TEXT_WIDTH,
    )
    return cast(model, case.dtype).eval()


def open_pipeline(case: Case, folder: Path) -> Denoising:
    """The smallest thing that can be placed, its weights mapped from their file."""
    kind = LTX2VideoTransformer3DModel if case.model == "ltx2" else FluxTransformer2DModel
    return Denoising(kind.from_pretrained(folder, dtype=case.dtype).eval(), "hidden_states")


def given(case: Case) -> dict[str, Any]:
    """Random latents and texts, the same in every process."""
    if case.model != "ltx2":
        return dict(inputs_of(case))
    generator = torch.Generator().manual_seed(1)

    def noise(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(case.dtype)

    frames, rows, columns = case.size
    return {
        "hidden_states": noise(1, case.num_tokens, LTX_CHANNELS),
        "audio_hidden_states": noise(1, AUDIO_TOKENS, LTX_CHANNELS),
        "encoder_hidden_states": noise(1, case.text, TEXT_WIDTH),
        "audio_encoder_hidden_states": noise(1, case.text, TEXT_WIDTH),
        "timestep": torch.full((1, case.num_tokens), 500.0),
        "audio_timestep": torch.full((1,), 500.0),
        "num_frames": frames,
        "height": rows,
        "width": columns,
        "audio_num_frames": AUDIO_TOKENS,
    }


def demo_folder() -> Path:
    """The pipeline that comes with penstock."""
    import penstock

    return Path(penstock.__file__).with_name("demo")


def write_pipeline(folder: Path, is_small: bool) -> None:
    """The demo with a denoiser of many more, and wider, random blocks."""
    torch.manual_seed(0)
    pipeline = DiffusionPipeline.from_pretrained(demo_folder(), dtype=torch.bfloat16)
    heads, (doubles, singles) = PIPELINE_HEADS, PIPELINE_LAYERS
    if is_small:
        heads, (doubles, singles) = SMALL_PIPELINE_HEADS, SMALL_PIPELINE_LAYERS
    torch.set_default_dtype(torch.bfloat16)  # made in float32, the model would take twice the memory
    sizes = {"num_attention_heads": heads, "num_layers": doubles, "num_single_layers": singles}
    model = FluxTransformer2DModel.from_config({**pipeline.transformer.config, **sizes})
    pipeline.register_modules(transformer=model.eval())
    pipeline.save_pretrained(folder)


def main() -> None:
    """Write the checkpoint that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("case", choices=[*CASES, "pipeline"])
    parser.add_argument("--small", action="store_true")
    options = parser.parse_args()
    if options.case == "pipeline":
        write_pipeline(options.folder, options.small)
    else:
        build(case_of(options.case, options.small)).save_pretrained(options.folder)


if __name__ == "__main__":
    main()
