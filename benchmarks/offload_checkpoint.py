"""Write a checkpoint of Flux's shape with random weights, once: a folder saved by diffusers.

    python benchmarks/offload_checkpoint.py FOLDER [--doubles 4] [--singles 8] [--heads 24]

With 24 heads of 128 the blocks are as wide as Flux's own, and only their number is smaller; with 12, a quarter
of the size, there are as many as Flux has, and each is as small a part of the whole as there. Every tensor has
other values than its neighbours, so that a block which runs with another's weights gives another output.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

MARKER = "complete.json"
FLUX_HEADS = 24
HEAD_WIDTH = 128
TEXT_WIDTH = 4096
POOLED_WIDTH = 768
CHANNELS = 64
_STEP_GIB = 1.16  # a double and two single blocks of Flux's width
_POOL_LENGTH = 4_194_301  # a prime: no tensor's length is a multiple of it
_DEVIATION = 0.02


@dataclass(frozen=True)
class Shape:
    """How many blocks of each kind, and how wide."""

    doubles: int
    singles: int
    heads: int

    @classmethod
    def of_size(cls, gib: float, heads: int) -> Shape:
        """The shape nearest to so many GiB: two single blocks for every double one, as in Flux."""
        count = max(1, round(gib / (_STEP_GIB * (heads / FLUX_HEADS) ** 2)))
        return cls(count, 2 * count, heads)

    @property
    def name(self) -> str:
        """Names the folder."""
        return f"flux-{self.doubles}-{self.singles}-{self.heads}"


def is_complete(folder: Path) -> bool:
    """Whether the checkpoint was written to its end."""
    return (folder / MARKER).is_file()


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights."""
    return sorted(folder.glob("*.safetensors"))


def num_weight_bytes(folder: Path) -> int:
    """Bytes of all weights."""
    return int(json.loads((folder / MARKER).read_text())["num_bytes"])


def write(folder: Path, shape: Shape) -> None:
    """Make the model and save it in bf16, in files of at most 2 GB."""
    import torch
    from diffusers import FluxTransformer2DModel, logging

    logging.set_verbosity_error()  # on the cast: this class keeps no module in float32
    with torch.device("meta"):
        model = FluxTransformer2DModel(
            in_channels=CHANNELS,
            num_layers=shape.doubles,
            num_single_layers=shape.singles,
            attention_head_dim=HEAD_WIDTH,
            num_attention_heads=shape.heads,
            joint_attention_dim=TEXT_WIDTH,
            pooled_projection_dim=POOLED_WIDTH,
        )
    model = model.to(torch.bfloat16).to_empty(device="cpu")
    pool = torch.randn(_POOL_LENGTH, generator=torch.Generator().manual_seed(1)).mul_(_DEVIATION).bfloat16()
    start = 0
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name and name.endswith("weight") and parameter.ndim == 1:
                parameter.fill_(1)
                continue
            flat, done = parameter.view(-1), 0
            while done < flat.numel():
                piece = pool[start : start + flat.numel() - done]
                flat[done : done + piece.numel()] = piece
                done += piece.numel()
                start = (start + piece.numel()) % _POOL_LENGTH
    model.save_pretrained(folder, max_shard_size="2GB")
    num_bytes = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters())
    (folder / MARKER).write_text(json.dumps({**asdict(shape), "num_bytes": num_bytes}))


def main() -> None:
    """Write the checkpoint that the arguments describe."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--doubles", type=int, default=4)
    parser.add_argument("--singles", type=int, default=8)
    parser.add_argument("--heads", type=int, default=24)
    options = parser.parse_args()
    write(options.folder, Shape(options.doubles, options.singles, options.heads))


if __name__ == "__main__":
    main()
