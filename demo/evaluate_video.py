"""Score the video model against its prompts: `python demo/evaluate_video.py`.

Every clip is read back by the checker. Exits with 1 if too few held-out prompts come out in their colour and direction.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path
from typing import Any

import torch
from diffusers import LTXPipeline
from PIL import Image, ImageDraw

from draw import SIZE, WHITE
from video.checker import Verdict, check
from video.grammar import motion_prompts

MODEL = Path(__file__).resolve().parents[1] / "src" / "penstock" / "demo-video"
BATCH = 16
COLUMNS = ("colour", "direction", "colour and direction", "shape", "all right")
SHEET_ROWS = 6
SHEET_COLUMNS = 6
SHEET_ZOOM = 2
LABEL_HEIGHT = 16


def load(folder: Path, dtype: torch.dtype) -> LTXPipeline:
    """Load the pipeline without its progress bar."""
    pipeline = LTXPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def film(pipeline: LTXPipeline, prompts: list[str], options: dict[str, Any], seed: int) -> list[list[Image.Image]]:
    """Make one clip per prompt.

    Args:
        pipeline: The model.
        prompts: The prompts.
        options: Arguments of the pipeline.
        seed: Seed of the first batch's noise; later batches count up.
    """
    clips: list[list[Image.Image]] = []
    for start in range(0, len(prompts), BATCH):
        chunk, generator = prompts[start : start + BATCH], torch.Generator().manual_seed(seed + start)
        clips += pipeline(prompt=chunk, generator=generator, **options).frames
    return clips


def shares(verdicts: list[Verdict]) -> list[float]:
    """Share of the clips that are right, for each of `COLUMNS`."""
    rows = [(one.colour, one.direction, one.follows, one.shape, one.everything) for one in verdicts]
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def contact_sheet(clips: list[list[Image.Image]], prompts: list[str]) -> Image.Image:
    """Lay out some frames of the first clips, one clip a row under its prompt."""
    cell = SIZE * SHEET_ZOOM
    rows = list(zip(clips, prompts, strict=True))[:SHEET_ROWS]
    sheet = Image.new("RGB", (SHEET_COLUMNS * (cell + 4), len(rows) * (cell + LABEL_HEIGHT)), WHITE)
    canvas = ImageDraw.Draw(sheet)
    for row, (clip, prompt) in enumerate(rows):
        top = row * (cell + LABEL_HEIGHT)
        canvas.text((4, top + 2), prompt, fill=(0, 0, 0))
        for column in range(SHEET_COLUMNS):
            frame = clip[round(column * (len(clip) - 1) / (SHEET_COLUMNS - 1))]
            left = column * (cell + 4)
            sheet.paste(frame.resize((cell, cell), Image.Resampling.BICUBIC), (left, top + LABEL_HEIGHT))
            canvas.rectangle(
                (left, top + LABEL_HEIGHT, left + cell - 1, top + LABEL_HEIGHT + cell - 1), outline=(200,) * 3
            )
    return sheet


def options() -> argparse.Namespace:
    """Read the command line; what it leaves out comes from the model's own defaults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the pipeline")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--num-frames", type=int, help="frames of a clip (default: the model's)")
    parser.add_argument("--frame-rate", type=int, help="frames per second (default: the model's)")
    parser.add_argument("--guidance-scale", type=float, help="guidance (default: the model's)")
    parser.add_argument("--max-sequence-length", type=int, help="T5 tokens (default: the model's)")
    parser.add_argument("--num-prompts", type=int, default=48, help="prompts of each kind, at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threshold", type=float, default=0.8, help="least share of held-out prompts followed")
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet of held-out prompts")
    args = parser.parse_args()
    args.options = json.loads((args.model / "penstock.json").read_text(encoding="utf-8"))["defaults"]
    given = {"num_inference_steps": args.steps, **vars(args)}
    args.options |= {name: given[name] for name in args.options if given.get(name) is not None}
    return args


def main() -> None:
    """Print the table and judge the score."""
    args = options()
    pipeline = load(args.model, getattr(torch, args.dtype))
    rng = random.Random(args.seed)
    print(f"{args.options}, {args.dtype}, seed {args.seed}\n")
    print(f"| prompts | clips | {' | '.join(COLUMNS)} |\n|{' --- |' * (2 + len(COLUMNS))}")
    for kind, listed in {"trained": motion_prompts(False), "held-out": motion_prompts(True)}.items():
        prompts = rng.sample(listed, min(args.num_prompts, len(listed)))
        clips = film(pipeline, prompts, args.options, args.seed)
        row = shares([check(clip, prompt) for clip, prompt in zip(clips, prompts, strict=True)])
        print(f"| {kind} | {len(prompts)} | {' | '.join(f'{share:.1%}' for share in row)} |", flush=True)
    if args.sheet:
        contact_sheet(clips, prompts).save(args.sheet)
    if row[2] < args.threshold:
        sys.exit(f"only {row[2]:.1%} of the held-out prompts are followed; wanted {args.threshold:.1%}")


if __name__ == "__main__":
    main()
