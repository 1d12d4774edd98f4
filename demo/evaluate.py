"""Score the model against its prompts: `python demo/evaluate.py`.

Every picture is read back by the checker. Exits with 1 if too few held-out prompts come out wholly right.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from dataclasses import astuple
from pathlib import Path

import torch
from diffusers import FluxPipeline
from PIL import Image, ImageDraw

from checker import Verdict, check
from draw import SIZE, WHITE
from grammar import pair_prompts, single_prompts

MODEL = Path(__file__).resolve().parents[1] / "src" / "penstock" / "demo"
BATCH = 48
COLUMNS = ("colour", "shape", "relation", "all right")
SHEET_COLUMNS = 6
SHEET_ROWS = 4
SHEET_ZOOM = 3
LABEL_HEIGHT = 30


def load(folder: Path, dtype: torch.dtype) -> FluxPipeline:
    """Load the pipeline without its progress bar."""
    pipeline = FluxPipeline.from_pretrained(folder, dtype=dtype)
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def paint(pipeline: FluxPipeline, prompts: list[str], steps: int, length: int, seed: int) -> list[Image.Image]:
    """Make one picture per prompt.

    Args:
        pipeline: The model.
        prompts: The prompts.
        steps: Denoising steps.
        length: The pipeline's `max_sequence_length`.
        seed: Seed of the first batch's noise; later batches count up.
    """
    pictures: list[Image.Image] = []
    for start in range(0, len(prompts), BATCH):
        pictures += pipeline(
            prompt=prompts[start : start + BATCH],
            height=SIZE,
            width=SIZE,
            num_inference_steps=steps,
            max_sequence_length=length,
            generator=torch.Generator().manual_seed(seed + start),
        ).images
    return pictures


def shares(verdicts: list[Verdict]) -> list[float]:
    """Share of the pictures that are right, for each of `COLUMNS`."""
    return [sum(column) / len(verdicts) for column in zip(*map(astuple, verdicts), strict=True)]


def contact_sheet(pictures: list[Image.Image], prompts: list[str]) -> Image.Image:
    """Lay out the first pictures in a grid, each over its prompt."""
    cell = SIZE * SHEET_ZOOM
    sheet = Image.new("RGB", (SHEET_COLUMNS * (cell + 8), SHEET_ROWS * (cell + LABEL_HEIGHT)), WHITE)
    canvas = ImageDraw.Draw(sheet)
    cells = list(zip(pictures, prompts, strict=True))[: SHEET_COLUMNS * SHEET_ROWS]
    for number, (picture, prompt) in enumerate(cells):
        row, column = divmod(number, SHEET_COLUMNS)
        left, top = column * (cell + 8) + 4, row * (cell + LABEL_HEIGHT)
        sheet.paste(picture.resize((cell, cell), Image.Resampling.BICUBIC), (left, top + 2))
        canvas.rectangle((left, top + 2, left + cell - 1, top + cell + 1), outline=(200, 200, 200))
        first, *second = prompt.split(" a ", 1)
        canvas.text((left + 2, top + cell + 3), "\n".join([first, *("a " + rest for rest in second)]), fill=(0, 0, 0))
    return sheet


def options() -> argparse.Namespace:
    """Read the command line; what it leaves out comes from the model's own defaults."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", type=Path, default=MODEL, help="folder of the pipeline")
    parser.add_argument("--steps", type=int, help="denoising steps (default: the model's)")
    parser.add_argument("--max-sequence-length", type=int, help="T5 tokens (default: the model's)")
    parser.add_argument("--num-prompts", type=int, default=104, help="prompts of each kind, at most")
    parser.add_argument("--seed", type=int, default=0, help="seed of the noise")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threshold", type=float, default=0.95, help="least share of held-out prompts all right")
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet of held-out prompts")
    args = parser.parse_args()
    defaults = json.loads((args.model / "penstock.json").read_text(encoding="utf-8"))["defaults"]
    args.steps = args.steps or defaults["num_inference_steps"]
    args.max_sequence_length = args.max_sequence_length or defaults["max_sequence_length"]
    return args


def main() -> None:
    """Print the table and judge the score."""
    args = options()
    pipeline = load(args.model, getattr(torch, args.dtype))
    rng = random.Random(args.seed)
    kinds = {"single": single_prompts(), "held-out pair": pair_prompts(True), "trained pair": pair_prompts(False)}
    print(f"{args.steps} steps, max_sequence_length {args.max_sequence_length}, {args.dtype}, seed {args.seed}\n")
    print(f"| prompts | pictures | {' | '.join(COLUMNS)} |\n| --- | --- | --- | --- | --- | --- |")
    held_out_score = 0.0
    for kind, listed in kinds.items():
        prompts = rng.sample(listed, min(args.num_prompts, len(listed)))
        pictures = paint(pipeline, prompts, args.steps, args.max_sequence_length, args.seed)
        row = shares([check(picture, prompt) for picture, prompt in zip(pictures, prompts, strict=True)])
        print(f"| {kind} | {len(prompts)} | {' | '.join(f'{share:.1%}' for share in row)} |", flush=True)
        if kind == "held-out pair":
            held_out_score = row[-1]
            if args.sheet:
                contact_sheet(pictures, prompts).save(args.sheet)
    if held_out_score < args.threshold:
        sys.exit(f"only {held_out_score:.1%} of the held-out prompts are all right; wanted {args.threshold:.1%}")


if __name__ == "__main__":
    main()
