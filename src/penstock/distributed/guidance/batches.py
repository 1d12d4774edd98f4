"""A denoiser's arguments, cut along the batch, and its output, put together again.

Owns the rules of what in a call belongs to the batch. Does not know what the batch is made of: prompts with and
without guidance, several pictures, or both.

The size of the batch, B, is that of the first argument: its leading size, or its length if it is a list of tensors.
Then every other argument must explain itself; one that does not leaves the call whole, which is slower and right:

- a tensor of leading size B is cut; one of no dims or leading size 1 counts for all; any other size is unexplained;
- tables of positions (`*rotary*`, `*rope*`, `*freqs*`, `*indices*`, and `img_ids`, `txt_ids` of two dims) are never
  cut, whatever their size: (cos, sin) is two long, and so is a batch of two; other `*_ids` of two dims are cut if
  their leading size is B, and tables if not;
- `*llama3*` holds the batch along dim 1, behind the layers of the encoder it comes from;
- dicts and sequences of tensors are cut item by item, each with the rules above;
- a sequence that is B long, and whose items do not carry the batch themselves, is cut as such: lists of tensors of
  different lengths, `img_shapes`. Where both readings would do, the call stays whole;
- lists of numbers that are settings by their name (`*_layers`, `*_scale`, ...) count for all; a tensor of one dim with
  such a name may be of samples or of layers, and is unexplained;
- numbers, texts and None count for all. Objects of unknown kinds, such as caches, are unexplained.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from penstock.distributed.group import Group
from penstock.errors import GenerationError

_TABLES = re.compile(r"rotary|rope|freqs|indices")
_POSITIONS = re.compile(r"^(img|txt|image_cond)_ids$")
_LAYERED = re.compile(r"controlnet|residual|text_encoder_layers|ip_adapter|ip_hidden_states")
_STACKED = re.compile(r"llama3")
_PER_SAMPLE = {"img_shapes", "shape_list", "text_lens"}
_SETTINGS = re.compile(r"_layers$|_blocks$|_scale$|_size$|_shape$")
_CONSTANTS = (bool, int, float, str, type(None), torch.dtype, torch.device)
_KNOWN_PROCESSORS = ("diffusers.models.", "penstock.")


class UnsplittableError(Exception):
    """An argument of which nobody knows whether it belongs to the batch; never leaves this module's callers."""


@dataclass(frozen=True)
class Batch:
    """A batch and a rank's share of it.

    Attributes:
        size: Samples in the whole batch.
        is_list: Whether the samples come in a list.
        start: First sample of the share.
        stop: One past its last.
    """

    size: int
    is_list: bool
    start: int
    stop: int

    def cut(self, name: str, value: Any) -> Any:
        """The share of an argument.

        Args:
            name: Of the argument, or its key in a dict.
            value: Anything.

        Raises:
            UnsplittableError: If it is unknown whether it belongs to the batch.
        """
        if isinstance(value, _CONSTANTS) or _TABLES.search(name):
            return value
        if isinstance(value, Tensor):
            return self._cut_tensor(name, value)
        if isinstance(value, Mapping):
            return {key: self.cut(str(key), item) for key, item in value.items()}
        if type(value) in (list, tuple):
            return self._cut_sequence(name, value)
        raise UnsplittableError(name)

    def _cut_tensor(self, name: str, tensor: Tensor) -> Tensor:
        if tensor.ndim == 0 or tensor.shape[0] == 1:
            return tensor
        if tensor.ndim == 2 and _POSITIONS.search(name):
            return tensor
        if tensor.ndim == 4 and _STACKED.search(name):
            return tensor if tensor.shape[1] == 1 else self._cut_tensor("", tensor.transpose(0, 1)).transpose(0, 1)
        if tensor.ndim == 1 and _SETTINGS.search(name):
            raise UnsplittableError(name)  # of each sample, or of each layer
        if tensor.shape[0] == self.size:
            return tensor[self.start : self.stop]
        if tensor.ndim == 2 and name.endswith("_ids"):
            return tensor
        raise UnsplittableError(name)

    def _cut_sequence(self, name: str, items: list[Any] | tuple[Any, ...]) -> Any:
        is_setting = bool(_SETTINGS.search(name)) and not any(isinstance(item, Tensor) for item in items)
        if not items or all(item is None for item in items) or is_setting:
            return items
        is_long = len(items) == self.size
        if (self.is_list or name in _PER_SAMPLE) and is_long and not _LAYERED.search(name):
            return items[self.start : self.stop]
        if is_long and not _LAYERED.search(name):
            if any(not isinstance(item, Tensor) or self._carries(item) for item in items):
                raise UnsplittableError(name)  # as long as the batch by accident, or one item for each sample
            return items[self.start : self.stop]
        if name in _PER_SAMPLE:
            if any(item != items[0] for item in items):
                raise UnsplittableError(name)
            return items  # the same for every sample
        return type(items)(self.cut(name, item) for item in items)

    def _carries(self, item: Tensor) -> bool:
        """Whether a tensor could be cut, or count for all, by itself."""
        return item.ndim == 0 or item.shape[0] in (1, self.size)

    def join(self, output: Any, group: Group) -> Any:
        """Puts together the outputs of all ranks' shares.

        Args:
            output: Of this rank's share: tensors or lists of tensors, nested in tuples or an output object.
            group: The ranks.

        Returns:
            The output of the whole batch, on every rank.

        Raises:
            GenerationError: If a tensor of the output does not belong to the batch.

        Cost: receives (size - 1) shares of the output.
        """
        share = self.stop - self.start

        def is_samples(value: Any) -> bool:
            return self.is_list and type(value) is list and len(value) == share

        def joined(value: Any) -> Any:
            if is_samples(value):
                by_sample = [group.all_gather(item) for item in value]
                return [by_sample[sample][rank] for rank in range(group.size) for sample in range(share)]
            if not isinstance(value, Tensor):
                return value
            if value.ndim == 0 or value.shape[0] != share:
                raise GenerationError(
                    f"A denoiser returned a tensor of shape {tuple(value.shape)} for {share} samples of {self.size}. "
                    "It cannot be put together along the batch. Use --cfg-parallel-size 1."
                )
            return torch.cat(group.all_gather(value))

        return tree_map(joined, output, is_leaf=is_samples)


def batch_of(sample: Any, group: Group) -> Batch | None:
    """The batch of a call and this rank's share; None if it cannot be shared out evenly.

    Args:
        sample: First argument of the call: (B, ...), or a list of B tensors of one shape.
        group: The ranks.
    """
    is_list = type(sample) is list and bool(sample) and all(isinstance(item, Tensor) for item in sample)
    if is_list and len({item.shape for item in sample}) > 1:
        return None
    if not is_list and not (isinstance(sample, Tensor) and sample.ndim > 0):
        return None
    size = len(sample)
    if size < 2 or size % group.size:
        return None
    share = size // group.size
    return Batch(size, is_list, group.rank * share, (group.rank + 1) * share)


def mixes_samples(denoiser: nn.Module) -> bool:
    """Whether attention looks from one sample to another, so that a part of the batch gives another result.

    Perturbed attention guidance does, and so may processors that are not of the library's models: frames of a video
    that attend to each other, for instance.
    """
    found = (module.__dict__.get("processor") or module._modules.get("processor") for module in denoiser.modules())
    kinds = {type(processor) for processor in found if processor is not None}
    return any("PAG" in kind.__name__ or not kind.__module__.startswith(_KNOWN_PROCESSORS) for kind in kinds)
