"""Train the demo model from nothing, without any download: `python demo/train.py all`.

The stages, in order, each leaving its result in `demo/work`:
    vae        the picture autoencoder
    polish     its decoder once more, for the corner pixels
    text       the two text encoders
    denoiser   the transformer; --resume goes on after an interruption
    assemble   the whole pipeline, saved to `src/penstock/demo`, which ships it
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

import assembly
import autoencoder
import denoiser
import text_encoders

HERE = Path(__file__).resolve().parent
WORK = HERE / "work"
MODEL = HERE.parent / "src" / "penstock" / "demo"
STAGES = ("vae", "polish", "text", "denoiser", "assemble")


def run(stage: str, seed: int, resume: bool) -> None:
    """Run one stage.

    Args:
        stage: One of `STAGES`.
        seed: Seed of everything random in it.
        resume: Whether the denoiser goes on from its last save.
    """
    if stage == "vae":
        autoencoder.train(WORK / "vae", seed)
    elif stage == "polish":
        autoencoder.polish(WORK / "vae", seed)
    elif stage == "text":
        text_encoders.train_clip(WORK / "text_encoder", seed)
        text_encoders.train_t5(WORK / "text_encoder_2", seed)
    elif stage == "denoiser":
        denoiser.train(WORK, seed, resume)
    else:
        assembly.assemble(WORK, MODEL)


def main() -> None:
    """Run the stages that the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads of every stage but the denoiser")
    parser.add_argument("--resume", action="store_true", help="let the denoiser go on from its last save")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    for stage in STAGES if args.stage == "all" else (args.stage,):
        run(stage, args.seed, args.resume)


if __name__ == "__main__":
    main()
