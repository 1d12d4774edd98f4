"""Which dtype each tensor of a component gets from stock diffusers or transformers, and loading it without a cast.

Owns the libraries' rules for dtypes, so that a cast can wait until a tensor is on its way to the device:

    stock:     from_pretrained(path, dtype)          reads, casts, keeps the cast copies in host memory
    penstock:  load_stored(..., dtype)               maps the files; nothing is read, nothing is copied
               target_dtypes(module, dtype)[name]    what each tensor is to be cast to, with the stock result's bits

Where the rules come from: diffusers' `load_model_dict_into_meta`, transformers' `_get_dtype_plan` and
`convert_and_load_state_dict_in_model`. Three things decide, and the tests compare each with the libraries:

- what the files hold is cast, but for modules that a class keeps in float32, and integers;
- transformers gives a tensor the dtype in which the class makes it, where the class names one;
- what the files do not hold (unsaved buffers) is made by the class under the dtype asked for, and never cast.
"""

from __future__ import annotations

import copy
import itertools
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from diffusers import ModelMixin
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from penstock.models.mapped import map_tensors
from penstock.models.skeleton import is_quantized
from penstock.weights.index import read_index


def target_dtypes(module: nn.Module, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype of every parameter and buffer after stock `from_pretrained(path, dtype=dtype)`.

    Args:
        module: a component as `load_stored` gives it for the same dtype.
        dtype: the dtype asked for.

    Returns:
        Every name in `named_parameters` and `named_buffers`, tied ones under each of their names. For quantised
        modules, and classes with a `from_pretrained` of their own, this is what they have.
    """
    targets = {name: tensor.dtype for name, tensor in _named_tensors(module)}
    saved = [name for name in module.state_dict() if name in targets]
    if is_quantized(module):
        return targets
    if _is_stock(type(module), ModelMixin):
        targets.update(_diffusers_dtypes(module, saved, targets, dtype))
    elif _is_stock(type(module), PreTrainedModel):
        targets.update(_transformers_dtypes(module, saved, dtype))
    return targets


def load_stored(
    component_class: Any, path: Path, variant: str | None, dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """Load a component like stock `from_pretrained(path, dtype=dtype)`, but leave its weights as they are stored.

    Args:
        component_class: its class.
        path: its folder.
        variant: of its weight files; plain files are taken where there are none of this variant.
        dtype: what stock would be asked for. Unsaved buffers and other tensors that the class makes itself
            have it already.

    Returns:
        The module, in evaluation mode, and the library's loading info (`missing_keys`, ...). Weights are views of
        the mapped files, but for those that transformers puts together from several. What is quantised, pickled
        or of a class with a `from_pretrained` of its own is loaded by that, and has been cast.

    Raises:
        WeightsError: for safetensors files that are missing, truncated or corrupt.
        OSError, ValueError, RuntimeError: as the libraries raise them.

    Cost: opens and maps the files; reads no weights.
    """
    index = read_index(path, variant)
    if index is not None and not _needs_stock_loader(path):
        state = map_tensors(index)
        if _is_stock(component_class, ModelMixin):
            return _load_diffusers(component_class, path, state, dtype)
        if _is_stock(component_class, PreTrainedModel):
            return _load_transformers(component_class, path, state, dtype)
    module, info = component_class.from_pretrained(str(path), dtype=dtype, variant=variant, output_loading_info=True)
    return module.eval(), info


def _named_tensors(module: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    parameters = module.named_parameters(remove_duplicate=False)
    return itertools.chain(parameters, module.named_buffers(remove_duplicate=False))


def _is_stock(component_class: type, library_class: Any) -> bool:
    """Whether a class is loaded by its library's own `from_pretrained`."""
    own = getattr(getattr(component_class, "from_pretrained", None), "__func__", None)
    return own is not None and own is getattr(library_class.from_pretrained, "__func__", None)


def _needs_stock_loader(path: Path) -> bool:
    """Whether the files hold more than plain weights: packed ones, or an adapter for weights elsewhere."""
    config = path / "config.json"
    if (path / "adapter_config.json").is_file() or not config.is_file():
        return True
    return bool(json.loads(config.read_text("utf-8")).get("quantization_config"))


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    usual = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(usual)


def _diffusers_dtypes(
    module: nn.Module, saved: list[str], stored: dict[str, torch.dtype], dtype: torch.dtype
) -> dict[str, torch.dtype]:
    """Floating-point tensors are cast; those under a listed module or name are float32, whatever was asked for."""
    kept: Any = getattr(type(module), "_keep_in_fp32_modules", None) or []
    names = {kept} if isinstance(kept, str) else set(kept)
    return {
        name: torch.float32 if names.intersection(name.split(".")) else dtype
        for name in saved
        if stored[name].is_floating_point
    }


def _transformers_dtypes(module: nn.Module, saved: list[str], dtype: torch.dtype) -> dict[str, torch.dtype]:
    """The dtype that the class itself makes a tensor in, but float32 where a listed pattern is found in its name."""
    twin = dict(_named_tensors(_empty_twin(module, dtype)))
    kept = _float32_pattern(module, dtype)
    targets = {name: torch.float32 if kept and kept.search(name) else twin[name].dtype for name in saved}
    tied: dict[str, str] = getattr(module, "all_tied_weights_keys", None) or {}
    tensors = dict(_named_tensors(module))
    for name, source in tied.items():
        if source in targets and name in targets and tensors[name] is tensors[source]:
            targets[name] = targets[source]  # one tensor, which is saved and cast under this name
    return targets


def _float32_pattern(module: Any, dtype: torch.dtype) -> re.Pattern[str] | None:
    """What stays in float32 for this dtype: `*` in it stands for anything, and it may begin anywhere in a name."""
    kept: list[str] = []
    if dtype == torch.float16:
        kept += sorted(module._keep_in_fp32_modules or ())
    if dtype in (torch.float16, torch.bfloat16):
        kept += sorted(module._keep_in_fp32_modules_strict or ())
    return re.compile("|".join(f"(?:{name.replace('*', '.*')})" for name in kept)) if kept else None


def _empty_twin(module: Any, dtype: torch.dtype) -> nn.Module:
    """A module of the same class and config, without weights, as the class makes it under a dtype."""
    with _default_dtype(dtype), init_empty_weights():
        twin: nn.Module = type(module)(copy.deepcopy(module.config))  # which says the same dtype since it was loaded
    return twin


def _load_diffusers(
    component_class: Any, path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """What `ModelMixin.from_pretrained` does with a plain folder, less the cast."""
    with _default_dtype(dtype), init_empty_weights():
        module: Any = component_class.from_config(component_class.load_config(path))
    rename: Any = getattr(module, "_fix_state_dict_keys_on_load", None)
    if rename is not None:
        rename(state)  # attention layers had other names in older checkpoints
    ignored = component_class._keys_to_ignore_on_load_unexpected or ()
    found = module.load_state_dict(state, strict=False, assign=True)
    unexpected = [key for key in found.unexpected_keys if not any(re.search(pattern, key) for pattern in ignored)]
    module.register_to_config(_name_or_path=str(path))
    info = {"missing_keys": found.missing_keys, "unexpected_keys": unexpected, "mismatched_keys": [], "error_msgs": []}
    return module.eval(), info


class _Uncast(torch.Tensor):
    """A tensor in a state dict for transformers, which casts each that it takes: this one stays what it is."""

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The tensor as it is, whatever was asked for."""
        return self.as_subclass(torch.Tensor)


def _load_transformers(
    component_class: Any, path: Path, state: dict[str, torch.Tensor], dtype: torch.dtype
) -> tuple[nn.Module, dict[str, Any]]:
    """What `PreTrainedModel.from_pretrained` does with a folder, by itself, with tensors that do not cast."""
    module, info = component_class.from_pretrained(
        None,
        config=component_class.config_class.from_pretrained(path),
        state_dict={name: tensor.as_subclass(_Uncast) for name, tensor in state.items()},
        dtype=dtype,
        output_loading_info=True,
    )
    for part in module.modules():  # nobody told them; the parts with a config of their own have another name
        for holder in (part, part.config) if isinstance(part, PreTrainedModel) else ():
            if holder.name_or_path in (None, "None"):
                holder.name_or_path = str(path)
    if module.can_generate():
        module.generation_config = _generation_config(path)
    return module.eval(), info


def _generation_config(path: Path) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(path)
    except OSError:  # none was saved
        return GenerationConfig.from_pretrained(path, config_file_name="config.json", _from_model_config=True)
