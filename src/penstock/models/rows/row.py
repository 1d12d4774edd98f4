"""What a row says: which arguments of a stack's blocks carry which stream of tokens, and which streams attention sees.

A *stream* is one sequence of tokens: `img`, `txt`, `vid`, `aud`. A *layout* is how a tensor carries streams along one
dim, written as text: `"img"` (along dim 1), `"img:0"` (along dim 0), `"txt+img:2"` (text, then image, along dim 2),
`"img:1/4"` (along dim 1 of a tensor of 4 dims; one of 3 dims under the same name carries none). An empty layout
stands for a tensor that carries none. A whole number under a layout is a count of its stream's first tokens, or of the
last ones under dim -1 (`"img:-1"`).

    Row(
        stacks=(
            StackRow(
                "transformer_blocks",
                takes={"hidden_states": "img", "encoder_hidden_states": "txt", "image_rotary_emb": "txt+img:0"},
                gives=("txt", "img"),
            ),
        ),
        attention={"attn": "txt+img"},
    )

Owns the notation. Does not know ranks, or the classes themselves.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

Layouts = str | tuple[str, ...]
"""The layout of an argument, and of every tensor in it; a tuple of layouts where its tensors differ."""

_LAYOUT = re.compile(r"([a-z]\w*(?:\+[a-z]\w*)*)(?::(-?\d+)(?:/(\d+))?)?")


@dataclass(frozen=True)
class Layout:
    """How one tensor carries streams.

    Attributes:
        streams: one after another; empty for a tensor that carries none.
        dim: along which they lie.
        num_dims: of the tensors that carry them; None for any.
    """

    streams: tuple[str, ...]
    dim: int = 1
    num_dims: int | None = None

    @classmethod
    def of(cls, text: str) -> Layout:
        """Read the notation.

        Raises:
            ValueError: for text that is no layout.
        """
        if not text:
            return cls(())
        match = _LAYOUT.fullmatch(text)
        if match is None:
            raise ValueError(f"{text!r} is no layout. Write streams and a dim, such as 'txt+img:1'.")
        return cls(tuple(match[1].split("+")), int(match[2] or 1), int(match[3]) if match[3] else None)


@dataclass(frozen=True)
class StackRow:
    """The blocks of one list, which all take and give the same.

    Attributes:
        path: of the list in the denoiser.
        takes: by argument of the block's forward, what it carries. Arguments that are left out are whole on every
            rank, and equal for all tokens.
        gives: what the block returns, in order; a single layout where it returns one tensor.
        is_closed: code behind the last block needs the streams whole: they are gathered there.
        is_apart: code between the blocks needs the streams whole: they are gathered after every block.
    """

    path: str
    takes: Mapping[str, Layouts]
    gives: tuple[str, ...]
    is_closed: bool = False
    is_apart: bool = False


@dataclass(frozen=True)
class Row:
    """How the tokens of one denoiser class can be split.

    Attributes:
        stacks: in the order in which they run; streams stay cut from one to the next, and are gathered after the last.
        attention: by regular expression over the path of a module in a block (`attn`, or `layers.attn` where stacks
            differ), the streams that its attention sees: one text where queries and keys are the same tokens, else
            (queries, keys). Attention that is not named has keys that are whole on every rank, and runs as it is.
        whole: streams that stay whole on every rank: short ones, and those that code between blocks needs.
        ends: by regular expression over the path of a module that runs behind the last block, what its first argument
            carries: streams are gathered there, and not after the last block. For code that counts tokens in between,
            or drops some.
        between: by regular expression over the path of a module that runs between blocks, what its first argument and
            its result carry: streams are gathered before it and cut after it.
        residuals: by argument of the denoiser's forward that is added to tokens between blocks (as those of a
            ControlNet), what its tensors carry. They are cut before the denoiser runs.
        masks: what to make of an attention mask that a block makes for its own queries and keys. Of "keys", it says
            which keys take part, and queries that do not take part themselves may see anything, as nobody reads them;
            of "outer", it is the product of a mask of tokens with itself. Of "absent", there is none: tokens of the
            stream that is whole are left out of calls where they do not take part. Else a mask cannot be split.
        refuses: by argument of the denoiser's forward, why a call that gives it cannot be split.
    """

    stacks: tuple[StackRow, ...]
    attention: Mapping[str, str | tuple[str, str]]
    whole: tuple[str, ...] = ()
    ends: Mapping[str, str] = field(default_factory=dict)
    between: Mapping[str, str] = field(default_factory=dict)
    residuals: Mapping[str, str] = field(default_factory=dict)
    masks: Literal["", "keys", "outer", "absent"] = ""
    refuses: Mapping[str, str] = field(default_factory=dict)

    def streams_of(self, stack: StackRow, path: str) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
        """The streams of the queries and of the keys of a module in a block; None where it is not named."""
        for pattern in self.patterns_of(stack, path):
            seen = self.attention[pattern]
            queries, keys = (seen, seen) if isinstance(seen, str) else seen
            return Layout.of(queries).streams, Layout.of(keys).streams
        return None

    def patterns_of(self, stack: StackRow, path: str) -> list[str]:
        """The patterns of `attention` that a module's path in a block of the stack matches; the first one counts."""
        paths = (path, f"{stack.path}.{path}")
        return [pattern for pattern in self.attention if any(re.fullmatch(pattern, found) for found in paths)]
