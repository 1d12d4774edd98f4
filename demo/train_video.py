"""Train the video demo model from nothing, without any download: `python demo/train_video.py all`.

The stages, in order, each leaving its result in `demo/work/video`:
    vae        the video autoencoder
    decoder    a wider decoder for it; latents made before stay valid
    text       the text encoder
    denoiser   the transformer; --resume goes on after an interruption
    assemble   the whole pipeline, saved to `src/penstock/demo-video`, which ships it
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from video import assembly, autoencoder, denoiser, text_encoder

HERE = Path(__file__).resolve().parent
WORK = HERE / "work" / "video"
MODEL = HERE.parent / "src" / "penstock" / "demo-video"
STAGES = ("vae", "decoder", "text", "denoiser", "assemble")


def run(stage: str, seed: int, resume: bool) -> None:
    """Run one stage.

    Args:
        stage: One of `STAGES`.
        seed: Seed of everything random in it.
        resume: Whether the denoiser goes on from its last save.
    """
    if stage == "vae":
        autoencoder.train(WORK / "vae", seed)
    elif stage == "decoder":
        autoencoder.widen(WORK / "vae", seed)
    elif stage == "text":
        text_encoder.train(WORK / "text_encoder", seed)
    elif stage == "denoiser":
        denoiser.train(WORK, seed, resume)
    else:
        assembly.assemble(WORK, MODEL)


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--resume", action="store_true", help="let the denoiser go on from its last save")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run(stage, args.seed, args.resume)


if __name__ == "__main__":
    main()
