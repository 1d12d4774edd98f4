"""The two text encoders, each trained alone to say what a prompt puts where, and then frozen.

The CLIP encoder's pooled vector must tell the colour and the shape in each slot of the scene. Each output token of
the T5 encoder must tell the slot, the colour and the shape of the noun phrase it stands in, however much padding
follows; padding must come out as one constant vector.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from transformers import CLIPTextConfig, CLIPTextModel, T5Config, T5EncoderModel

from grammar import COLOURS, MAX_WORDS, SHAPES, SLOTS, WORDS, mentions, pair_prompts, scene_of, training_prompts
from schedule import learning_rate
from vocabulary import CLIP_LENGTH, SPACE, clip_tokenizer, spellings, t5_tokenizer

CLIP_WIDTH = 64
T5_WIDTH = 64
CLIP_STEPS = 800
T5_STEPS = 900
BATCH = 128
PEAK_LEARNING_RATE = 2e-3
LENGTHS = (16, 32, 64, 128, 256, 512)
LENGTH_WEIGHTS = (6, 5, 4, 3, 2, 1)
TOKENS_PER_STEP = 4096
CONSTANCY_WEIGHT = 1.0
NONE = 0
PHRASE_WORDS = 3
TWIN_WEIGHT = 4.0


def build_clip() -> CLIPTextModel:
    """An untrained CLIP text encoder."""
    config = CLIPTextConfig(
        vocab_size=len(clip_tokenizer()),
        hidden_size=CLIP_WIDTH,
        intermediate_size=2 * CLIP_WIDTH,
        projection_dim=CLIP_WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=CLIP_LENGTH,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    return CLIPTextModel(config)


def build_t5(words: Sequence[str] = WORDS) -> T5EncoderModel:
    """An untrained T5 encoder of these words."""
    config = T5Config(
        vocab_size=len(t5_tokenizer(words)),
        d_model=T5_WIDTH,
        d_kv=16,
        num_heads=4,
        d_ff=2 * T5_WIDTH,
        num_layers=3,
        feed_forward_proj="gated-gelu",
        dropout_rate=0.0,
        pad_token_id=0,
        eos_token_id=1,
        is_encoder_decoder=False,
        use_cache=False,
        tie_word_embeddings=False,
    )
    return T5EncoderModel(config)


def clip_ids(prompts: list[str]) -> torch.Tensor:
    """Token ids `(n, CLIP_LENGTH)` as the pipeline makes them."""
    tokenizer = clip_tokenizer()
    return tokenizer(prompts, padding="max_length", truncation=True, return_tensors="pt").input_ids


def t5_ids(prompts: list[str], length: int, words: Sequence[str] = WORDS) -> torch.Tensor:
    """Token ids `(n, length)` as the pipeline makes them."""
    tokenizer = t5_tokenizer(words)
    return tokenizer(prompts, padding="max_length", max_length=length, truncation=True, return_tensors="pt").input_ids


def slot_labels(prompts: list[str]) -> torch.Tensor:
    """Colour and shape numbers `(n, 2 * slots)`, slot by slot; 0 stands for an empty slot."""
    rows = []
    for prompt in prompts:
        placed = dict(scene_of(prompt).placed)
        row = []
        for slot in SLOTS:
            thing = placed.get(slot)
            row += [NONE, NONE] if thing is None else [1 + COLOURS.index(thing.colour), 1 + SHAPES.index(thing.shape)]
        rows.append(row)
    return torch.tensor(rows)


def token_labels(prompts: list[str]) -> torch.Tensor:
    """Slot, colour and shape numbers `(n, MAX_WORDS + 1, 3)` of each word and the end mark.

    A word belongs to its noun phrase, a relation's words to the phrase before; everything else is 0.
    """
    labels = torch.full((len(prompts), MAX_WORDS + 1, 3), NONE)
    for row, prompt in enumerate(prompts):
        words = len(prompt.split())
        named = mentions(prompt)
        starts = [0, words - PHRASE_WORDS][: len(named)]
        for start, (slot, thing) in zip(starts, named, strict=True):
            numbers = (SLOTS.index(slot), COLOURS.index(thing.colour), SHAPES.index(thing.shape))
            labels[row, start:words] = 1 + torch.tensor(numbers)
    return labels


class Trainer:
    """Steps an optimizer over an encoder and its label heads, which are thrown away afterwards."""

    def __init__(self, modules: nn.Module, steps: int) -> None:
        self.modules = modules
        self.steps = steps
        self.taken = 0
        self.optimizer = torch.optim.AdamW(modules.parameters(), lr=PEAK_LEARNING_RATE, weight_decay=0.1)

    def step(self, loss: torch.Tensor) -> None:
        """Follow the gradient of one loss."""
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(self.taken, self.steps, PEAK_LEARNING_RATE, warmup=50)
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.modules.parameters(), 1.0)
        self.optimizer.step()
        self.taken += 1


def heads(width: int, classes: list[int]) -> nn.ModuleList:
    """One linear classifier per label."""
    return nn.ModuleList([nn.Linear(width, count) for count in classes])


def label_loss(scores: list[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Mean cross entropy over the labels; `labels` holds one number per classifier in its last dimension."""
    losses = [F.cross_entropy(score.flatten(0, -2), labels[..., i].flatten()) for i, score in enumerate(scores)]
    return torch.stack(losses).mean()


def all_right(scores: list[torch.Tensor], labels: torch.Tensor) -> float:
    """Share of the rows whose labels are all told right."""
    guesses = torch.stack([score.argmax(-1) for score in scores], dim=-1)
    return (guesses == labels).flatten(1).all(1).float().mean().item()


def train_clip(folder: Path, seed: int) -> None:
    """Train the CLIP encoder on training prompts, print its score on held-out ones and save it."""
    torch.manual_seed(seed)
    model = build_clip()
    judges = heads(CLIP_WIDTH, [1 + len(COLOURS), 1 + len(SHAPES)] * len(SLOTS))
    trainer = Trainer(nn.ModuleList([model, judges]), CLIP_STEPS)
    prompts = training_prompts()
    ids, labels = clip_ids(prompts), slot_labels(prompts)
    for step in range(CLIP_STEPS):
        chosen = torch.randint(len(prompts), (BATCH,))
        pooled = model(ids[chosen]).pooler_output
        loss = label_loss([judge(pooled) for judge in judges], labels[chosen])
        trainer.step(loss)
        if step % 100 == 99:
            print(f"clip {step + 1} loss {loss.item():.4f}", flush=True)
    held_out = pair_prompts(held_out=True)
    with torch.no_grad():
        pooled = model(clip_ids(held_out)).pooler_output
        score = all_right([judge(pooled) for judge in judges], slot_labels(held_out))
    print(f"clip: held-out prompts all right {score:.3f}", flush=True)
    model.save_pretrained(folder)


def names_twins(prompt: str) -> bool:
    """Whether a prompt names the same thing twice, which only word order tells apart and so is learned last."""
    things = [thing for _, thing in mentions(prompt)]
    return len(things) > len(set(things))


def train_t5(folder: Path, seed: int) -> None:
    """Train the T5 encoder at many padded lengths, print its score on held-out prompts and save it."""
    torch.manual_seed(seed)
    rng = random.Random(seed)
    model = build_t5()
    judges = heads(T5_WIDTH, [1 + len(SLOTS), 1 + len(COLOURS), 1 + len(SHAPES)])
    padding = nn.Parameter(torch.randn(T5_WIDTH))
    trainer = Trainer(nn.ModuleList([model, judges, nn.ParameterList([padding])]), T5_STEPS)
    prompts = training_prompts()
    ids = {length: t5_ids(prompts, length) for length in LENGTHS}
    labels = token_labels(prompts)
    weights = torch.tensor([TWIN_WEIGHT if names_twins(prompt) else 1.0 for prompt in prompts])
    named = labels.shape[1]
    for step in range(T5_STEPS):
        lengths = rng.choices(LENGTHS, LENGTH_WEIGHTS, k=2)
        chosen = weights.multinomial(min(BATCH, TOKENS_PER_STEP // max(lengths)))
        told, stray, words = torch.zeros(()), torch.zeros(()), []
        for length in lengths:
            batch = ids[length][chosen]
            out = model(batch).last_hidden_state
            words.append(out[:, :named])
            told = told + label_loss([judge(words[-1]) for judge in judges], labels[chosen])
            stray = stray + ((out - padding) ** 2)[batch == model.config.pad_token_id].mean()
        drift = ((words[0] - words[1]) ** 2).mean()
        trainer.step(told + CONSTANCY_WEIGHT * (stray + drift))
        if step % 100 == 99:
            parts = f"loss {told.item():.4f} padding {stray.item():.5f} drift {drift.item():.5f}"
            print(f"t5 {step + 1} {parts}", flush=True)
    share_spellings(model)
    report_t5(model, judges)
    model.save_pretrained(folder)


@torch.no_grad()
def report_t5(model: T5EncoderModel, judges: nn.ModuleList) -> None:
    """Print the score on held-out prompts at each padded length."""
    held_out = pair_prompts(held_out=True)
    labels = token_labels(held_out)
    for length in LENGTHS:
        out = model(t5_ids(held_out, length)).last_hidden_state[:, : labels.shape[1]]
        score = all_right([judge(out) for judge in judges], labels)
        print(f"t5: held-out prompts all right {score:.3f} at length {length}", flush=True)


@torch.no_grad()
def share_spellings(model: T5EncoderModel, words: Sequence[str] = WORDS) -> None:
    """Give the capitalised spellings of a word the vector of its lower-case spelling."""
    tokenizer = t5_tokenizer(words)
    vectors = model.get_input_embeddings().weight
    for word in words:
        lower, *others = (tokenizer.convert_tokens_to_ids(SPACE + spelling) for spelling in spellings(word))
        for other in others:
            vectors[other] = vectors[lower]
