"""The text encoder of the video demo, trained alone to say what moves where to, and then frozen.

Each output token must tell the colour, the shape and the direction, however much padding follows; an empty prompt
must tell that there is none.
"""

from __future__ import annotations

import random
from pathlib import Path

import torch
from torch import nn
from transformers import T5EncoderModel

from grammar import COLOURS, SHAPES
from text_encoders import (
    LENGTH_WEIGHTS,
    LENGTHS,
    NONE,
    T5_WIDTH,
    TOKENS_PER_STEP,
    Trainer,
    all_right,
    build_t5,
    heads,
    label_loss,
    share_spellings,
    t5_ids,
)
from video.grammar import DIRECTIONS, MAX_WORDS, WORDS, motion_of, motion_prompts

STEPS = 500
NAMED_TOKENS = MAX_WORDS + 1
EMPTY = ""


def token_labels(prompts: list[str]) -> torch.Tensor:
    """Colour, shape and direction numbers `(n, NAMED_TOKENS, 3)` of each word and the end mark; 0 is none."""
    rows = []
    for prompt in prompts:
        if prompt == EMPTY:
            rows.append([NONE, NONE, NONE])
            continue
        motion = motion_of(prompt)
        numbers = (
            COLOURS.index(motion.thing.colour),
            SHAPES.index(motion.thing.shape),
            DIRECTIONS.index(motion.direction),
        )
        rows.append([1 + number for number in numbers])
    return torch.tensor(rows)[:, None].expand(-1, NAMED_TOKENS, -1)


def train(folder: Path, seed: int) -> None:
    """Train the encoder at many padded lengths, print its score on held-out prompts and save it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build_t5(WORDS)
    judges = heads(T5_WIDTH, [1 + len(COLOURS), 1 + len(SHAPES), 1 + len(DIRECTIONS)])
    trainer = Trainer(nn.ModuleList([model, judges]), STEPS)
    prompts = [*motion_prompts(held_out=False), EMPTY]
    ids = {length: t5_ids(prompts, length, WORDS) for length in LENGTHS}
    labels = token_labels(prompts)
    for step in range(STEPS):
        lengths = rng.choices(LENGTHS, LENGTH_WEIGHTS, k=2)
        chosen = torch.randperm(len(prompts))[: TOKENS_PER_STEP // max(lengths)]
        out = [model(ids[length][chosen]).last_hidden_state[:, :NAMED_TOKENS] for length in lengths]
        told = sum(label_loss([judge(words) for judge in judges], labels[chosen]) for words in out)
        drift = ((out[0] - out[1]) ** 2).mean()
        trainer.step(told + drift)
        if step % 100 == 99:
            print(f"t5 {step + 1} loss {told.item():.4f} drift {drift.item():.5f}", flush=True)
    share_spellings(model, WORDS)
    report(model, judges)
    model.save_pretrained(folder)


@torch.no_grad()
def report(model: T5EncoderModel, judges: nn.ModuleList) -> None:
    """Print the score on held-out prompts at each padded length."""
    held_out = motion_prompts(held_out=True)
    labels = token_labels(held_out)
    for length in LENGTHS:
        out = encode(model, held_out, length)
        score = all_right([judge(out) for judge in judges], labels)
        print(f"t5: held-out prompts all right {score:.3f} at length {length}", flush=True)


@torch.no_grad()
def encode(model: T5EncoderModel, prompts: list[str], length: int) -> torch.Tensor:
    """Outputs `(n, NAMED_TOKENS, width)` for prompts that are padded to a length."""
    return model(t5_ids(prompts, length, WORDS)).last_hidden_state[:, :NAMED_TOKENS]
