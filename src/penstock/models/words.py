"""Words for the arguments of a call: equal for equal contents, to tell calls apart by.

Owns which kinds of values have one. Does not know what calls are told apart for.
"""

from __future__ import annotations

import hashlib
from collections.abc import Hashable
from typing import Any

import numpy as np
import torch
from PIL import Image


def word_of(value: Any) -> Hashable:
    """Something hashable that stands for a value's contents, whatever device these are on.

    Args:
        value: numbers, texts, tensors, arrays, pictures, and lists or tuples of these.

    Returns:
        None for anything else, for lists and tuples that hold it, and for tensors and arrays without bytes of their
        own. The word of None is not None.

    Cost: contents are brought to the CPU and read once, at about 1 GB/s.
    """
    if value is None or isinstance(value, (str, int, float, bool, torch.device, torch.dtype)):
        return type(value).__name__, value
    if isinstance(value, torch.Tensor):
        return None if value.is_meta else ("tensor", value.dtype, tuple(value.shape), _digest(_bytes_of(value)))
    if isinstance(value, (np.ndarray, np.generic)):
        array = np.asarray(value)
        return None if array.dtype.hasobject else ("array", str(array.dtype), array.shape, _digest(array.tobytes()))
    if isinstance(value, Image.Image):
        return "image", value.mode, value.size, tuple(value.getpalette() or ()), _digest(value.tobytes())
    if isinstance(value, (list, tuple)):
        words = tuple(word_of(item) for item in value)
        return None if any(word is None for word in words) else (type(value).__name__, *words)
    return None


def _bytes_of(tensor: torch.Tensor) -> Any:
    flat = tensor.detach().cpu().contiguous().view(-1)
    if len(flat) and flat.stride(0) != 1:  # one element, spread
        flat = flat.as_strided(flat.shape, (1,))
    return flat.view(torch.uint8).numpy().data if len(flat) else b""


def _digest(contents: Any) -> bytes:
    return hashlib.blake2b(contents).digest()
