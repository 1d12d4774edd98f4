"""A pipeline without weights: its real class, tokenizers and schedulers, its modules on the meta device.

Owns the way from `model_index.json` to Python classes. Reads configs and safetensors headers, no weights.
"""

from __future__ import annotations

import importlib
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import diffusers
from accelerate import init_empty_weights
from diffusers import ModelMixin, pipelines
from diffusers.utils.dynamic_modules_utils import get_class_from_dynamic_module
from huggingface_hub.errors import StrictDataclassError
from torch import nn

from penstock.config import SourceConfig
from penstock.errors import ConfigError, ModelError, NotAPipelineError, WeightsError
from penstock.models.folder import ModelFolder
from penstock.models.ledger import tensors_of
from penstock.models.quiet import quiet_libraries
from penstock.weights.index import REDO, WeightIndex, read_index

_STOCK_LIBRARIES = ("diffusers", "transformers")
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")


@dataclass(frozen=True)
class Skeleton:
    """A pipeline without weights.

    Attributes:
        folder: where it was read from.
        pipeline: an instance of the real class; its modules have shapes and no storage.
        classes: module name to class, for those that have weights.
        indexes: module name to where its weights lie; modules without safetensors files are left out.
    """

    folder: ModelFolder
    pipeline: Any
    classes: dict[str, Any]
    indexes: dict[str, WeightIndex]

    def num_bytes(self, name: str) -> int:
        """Bytes of a module's weights in its files; 0 where these are no safetensors files."""
        return self.indexes[name].num_bytes if name in self.indexes else 0

    def unused(self, name: str) -> tuple[str, ...]:
        """Tensors in a module's files that its config has no place for; diffusers leaves them out.

        Empty where the names of files and module differ on purpose, as in some transformers models.
        """
        module = getattr(self.pipeline, name)
        if name not in self.indexes or is_quantized(module):
            return ()
        known, held = set(tensors_of(module)), dict.fromkeys(self.indexes[name].tensors)
        if isinstance(module, ModelMixin):
            rename: Any = getattr(module, "_fix_state_dict_keys_on_load", None)
            if rename is not None:
                rename(held)  # attention layers had other names in older checkpoints
        elif not known <= held.keys():
            return ()
        return tuple(sorted(held.keys() - known))

    @property
    def notes(self) -> tuple[str, ...]:
        """What a user should know of the model's files."""
        notes = []
        for name in self.classes:
            unused = self.unused(name)
            if unused:
                num_bytes = sum(self.indexes[name].tensors[key].num_bytes for key in unused)
                notes.append(
                    f"{name}: {len(unused)} tensors ({num_bytes} bytes) of its files have no place in the module that "
                    f"its config describes and are not used, such as {unused[0]}"
                )
            if name not in self.indexes:
                notes.append(f"{name} has no safetensors files; its bytes are counted at float32")
        return tuple(notes)

    def has_variant(self, name: str, variant: str | None) -> bool:
        """Whether a module's files are of this variant."""
        return variant is not None and any(f".{variant}" in record.file.name for record in self.indexes.get(name, ()))


def build_skeleton(folder: ModelFolder, config: SourceConfig) -> Skeleton:
    """Build a pipeline whose modules are on the meta device.

    Raises:
        NotAPipelineError: for a class that diffusers does not have, or code that is not trusted.
        WeightsError: for weight files that are missing, truncated or corrupt.
        ModelError: for a component whose config cannot be read or does not fit its class.

    Cost: reads configs, tokenizers and headers; allocates no weights.
    """
    pipeline_class = _find_pipeline_class(folder, config)
    classes, modules, indexes = {}, {}, {}
    for name, (library, class_name) in folder.component_classes.items():
        if not folder.component_path(name).is_dir():
            raise ModelError(f"{folder.path}: component {name!r} has no folder. Download or save the model again.")
        component_class = _find_class(folder, name, library, class_name, config)
        if not (isinstance(component_class, type) and issubclass(component_class, nn.Module)):
            continue
        classes[name] = component_class
        modules[name] = _on_meta(folder, name, component_class)
        index = read_index(folder.component_path(name), config.variant)
        if index is not None:
            indexes[name] = index
            _check_shapes(folder.component_path(name), modules[name], index)
        elif tensors_of(modules[name]):
            _check_pickled(folder.component_path(name))
    skeleton = Skeleton(folder, assemble(pipeline_class, folder, modules, config), classes, indexes)
    _check_variant(skeleton, config)
    return skeleton


def assemble(pipeline_class: Any, folder: ModelFolder, components: dict[str, Any], config: SourceConfig) -> Any:
    """Build the stock pipeline around components that exist already; the others are read from the folder.

    The class itself must be asked: `DiffusionPipeline.from_pretrained` of diffusers 0.42 does not see which
    components of a subclass are optional (Wan's transformers), and loads these again from their files.

    Raises:
        ModelError: where diffusers cannot put the pipeline together.
    """
    try:
        with quiet_libraries():
            return pipeline_class.from_pretrained(folder.path, trust_remote_code=config.trust_remote_code, **components)
    except (OSError, ValueError, TypeError, KeyError, ImportError, AttributeError) as error:
        raise ModelError(f"{folder.path}: diffusers cannot build {folder.class_name}: {_brief(error)}") from error


def _find_pipeline_class(folder: ModelFolder, config: SourceConfig) -> Any:
    name = folder.index["_class_name"]
    if isinstance(name, list):
        _require_trust(folder, "the pipeline's class", config)
        return get_class_from_dynamic_module(
            str(folder.path), module_file=f"{name[0]}.py", class_name=name[1], trust_remote_code=True
        )
    if not hasattr(diffusers, name):
        raise NotAPipelineError(
            f"{folder.path}: diffusers {diffusers.__version__} has no pipeline class {name!r}. "
            "Install a diffusers that has it, or correct model_index.json."
        )
    return getattr(diffusers, name)


def _check_variant(skeleton: Skeleton, config: SourceConfig) -> None:
    if config.variant is None:
        return
    if not any(skeleton.has_variant(name, config.variant) for name in skeleton.classes):
        raise ConfigError(
            f"variant={config.variant!r} is not in {skeleton.folder.path}: no weight file has it in its name. "
            "Leave it out."
        )


def _require_trust(folder: ModelFolder, what: str, config: SourceConfig) -> None:
    if not config.trust_remote_code:
        raise NotAPipelineError(
            f"{folder.path}: {what} is Python code that would run on this machine and is not part of diffusers or "
            "transformers. Read it, then pass --trust-remote-code (trust_remote_code=True)."
        )


def _find_class(folder: ModelFolder, name: str, library: str, class_name: str, config: SourceConfig) -> Any:
    if (folder.component_path(name) / f"{library}.py").is_file():
        _require_trust(folder, f"the class of {name!r}", config)
        return get_class_from_dynamic_module(
            str(folder.path),
            module_file=f"{name}/{library}.py",
            class_name=class_name,
            trust_remote_code=True,
        )
    home = _home_of(folder, name, library, config)
    found = getattr(home, class_name, None)
    if found is None:
        raise ModelError(
            f"{folder.path}: component {name!r} is a {library}.{class_name}, which the installed {library} "
            "does not have. Install the version that the model was saved with."
        )
    return found


def _home_of(folder: ModelFolder, name: str, library: str, config: SourceConfig) -> Any:
    """The module that holds a component's class; only those of diffusers and transformers without being trusted."""
    if library in _STOCK_LIBRARIES:
        return importlib.import_module(library)
    home = getattr(pipelines, library, None)  # such as `ltx2`, whose connectors are defined beside the pipeline
    if home is not None:
        return home
    if library.isidentifier() and importlib.util.find_spec(f"{pipelines.__name__}.deprecated.{library}") is not None:
        raise ModelError(
            f"{folder.path}: component {name!r} is of the pipeline {library!r}, which diffusers "
            f"{diffusers.__version__} has retired. Use an older diffusers without penstock, or another model."
        )
    _require_trust(folder, f"the class of {name!r} is in the module {library!r}, which", config)
    try:
        return importlib.import_module(library)
    except ImportError as error:
        raise ModelError(
            f"{folder.path}: component {name!r} needs the library {library!r}: {error}. Install it."
        ) from error


def _on_meta(folder: ModelFolder, name: str, component_class: Any) -> nn.Module:
    path = folder.component_path(name)
    try:
        with init_empty_weights():
            if hasattr(component_class, "load_config"):
                module: nn.Module = component_class.from_config(component_class.load_config(path))
            else:
                module = component_class(component_class.config_class.from_pretrained(path))
        tie_weights: Any = getattr(module, "tie_weights", None)
        if tie_weights is not None:
            tie_weights()  # on the meta device every registration made a tensor of its own
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RuntimeError, StrictDataclassError) as error:
        raise ModelError(f"{path}: no {component_class.__name__} fits this config: {_brief(error)}") from error
    return module.eval().requires_grad_(False)


def is_quantized(module: nn.Module) -> bool:
    """Whether the files hold packed weights under names of their own."""
    return bool(getattr(getattr(module, "config", None), "quantization_config", None))


def _check_pickled(path: Path) -> None:
    """A component without safetensors files has pickled ones, or it has no weights."""
    if any(file for pattern in _PICKLED for file in path.glob(pattern)):
        return
    others = sorted({file.name for file in path.glob("*.safetensors")})
    hint = f" There is {', '.join(others)}: try --variant with the middle of that name." if others else ""
    raise WeightsError(f"{path}: no weight files that can be read.{hint} {REDO}")


def _check_shapes(path: Path, module: nn.Module, index: WeightIndex) -> None:
    """Tensors of one name have one shape in the config's module and in the files; quantised ones are packed."""
    if is_quantized(module):
        return
    for name, tensor in tensors_of(module).items():
        record = index.tensors.get(name)
        if record is not None and record.shape != tuple(tensor.shape):
            raise WeightsError(
                f"{record.file}: {name} has shape {record.shape}, but {path.name}/config.json describes "
                f"{tuple(tensor.shape)}. Config and weights are not of one model: download or save it again."
            )


def _brief(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0] if lines else 'no message'}"
