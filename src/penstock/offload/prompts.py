"""Repeated prompts need no encoder: what `encode_prompt` returned is kept, up to so many bytes.

The key is what a call can be told by: arguments, templates and guidance of the pipeline, and which encoders and
tokenizers it has. A call with arguments of another kind, or with adapters in an encoder, is not kept. What nobody can
see, such as an encoder whose weights or hooks are changed in place, needs `remove`, or no cache: it is off unless asked
for.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves, tree_map_only

from penstock.models.words import word_of

_METHOD = "encode_prompt"


class PromptCache:
    """The last results of a pipeline's `encode_prompt`.

    Args:
        pipeline: whose method is wrapped; another encoder or tokenizer in it is another key.
        max_bytes: of all results kept; the least recently used go first.

    Attributes:
        num_hits: calls answered without an encoder.
        num_bytes: of the results kept now.
    """

    def __init__(self, pipeline: Any, max_bytes: int) -> None:
        self._pipeline = pipeline
        self._max_bytes = max_bytes
        self._kept: OrderedDict[tuple[Any, ...], tuple[list[Any], Any]] = OrderedDict()  # key -> owners, result
        self._encode: Callable[..., Any] | None = None
        self._own: Callable[..., Any] | None = None
        self.num_hits = 0
        self.num_bytes = 0

    def install(self) -> None:
        """Wrap the pipeline's method, where it has one."""
        if self._max_bytes and callable(getattr(self._pipeline, _METHOD, None)):
            self._own = vars(self._pipeline).get(_METHOD)
            self._encode = getattr(self._pipeline, _METHOD)
            setattr(self._pipeline, _METHOD, wraps(self._encode)(partial(PromptCache._answer, self)))

    def remove(self) -> None:
        """Give the method back and forget all results."""
        if self._encode is not None:
            vars(self._pipeline).pop(_METHOD, None)
            if self._own is not None:
                setattr(self._pipeline, _METHOD, self._own)
            self._encode = None
        self._kept.clear()
        self.num_bytes = 0

    def _answer(self, *args: Any, **kwargs: Any) -> Any:
        assert self._encode is not None
        owners = [value for value in vars(self._pipeline).values() if hasattr(value, "__dict__")]
        key = self._key(owners, args, kwargs)
        if key is not None and key in self._kept:
            self._kept.move_to_end(key)
            self.num_hits += 1
            return _copied(self._kept[key][1])
        result = self._encode(*args, **kwargs)
        if key is not None:
            self._keep(key, owners, result)
        return result

    def _keep(self, key: tuple[Any, ...], owners: list[Any], result: Any) -> None:
        num_bytes = _num_bytes(result)
        if num_bytes > self._max_bytes:
            return
        self._kept[key] = owners, _copied(result)  # an id is the owner's as long as it lives
        self.num_bytes += num_bytes
        while self.num_bytes > self._max_bytes:
            _, (_, oldest) = self._kept.popitem(last=False)
            self.num_bytes -= _num_bytes(oldest)

    def _key(self, owners: list[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        if any(getattr(owner, "peft_config", None) for owner in owners if isinstance(owner, nn.Module)):
            return None
        told = [*args, *(item for pair in sorted(kwargs.items()) for item in pair)]
        words = [word_of(value) for value in (len(args), *told, *_settings(self._pipeline), *map(_length, owners))]
        if any(word is None for word in words):
            return None
        return (*map(id, owners), torch.is_inference_mode_enabled(), *_autocast(), *words)


def _settings(pipeline: Any) -> list[Any]:
    """What a pipeline may ask itself when it encodes: its templates, and whether it needs a negative prompt."""
    texts = [value for _, value in sorted(vars(pipeline).items()) if isinstance(value, str)]
    return [vars(pipeline).get("_guidance_scale"), *texts]


def _autocast() -> list[Any]:
    """The dtype that autocast gives results, per device; None where it is off."""
    return [
        torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None for device in ("cpu", "cuda")
    ]


def _length(part: Any) -> int:
    """Of a tokenizer, which grows when words are taught to it."""
    return len(part) if hasattr(part, "tokenize") and hasattr(part, "__len__") else 0


def _copied(result: Any) -> Any:
    return tree_map_only(torch.Tensor, lambda tensor: tensor.clone(), result)


def _num_bytes(result: Any) -> int:
    return sum(leaf.numel() * leaf.itemsize for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor))
