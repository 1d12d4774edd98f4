"""From the name a user gives to a folder saved by diffusers.

Owns the three kinds of name (built-in, folder, hub id), `model_index.json`, and the maker's `penstock.json`.
Does not know classes or weights.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from penstock.config import SourceConfig
from penstock.errors import ConfigError, ModelError, ModelNotFoundError, NotAPipelineError

BUILT_IN = ("demo", "demo-video")
"""The miniature models that ship with penstock, each in the folder of its name: one of pictures, one of videos."""

_NAMES = ", ".join(map(repr, BUILT_IN))
_INDEX = "model_index.json"
_NOTES = "penstock.json"
_WEIGHT_FILES = (".safetensors", ".ckpt", ".pt", ".pth", ".bin", ".gguf")
_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")


class PromptGrammar(BaseModel):
    """Which prompts a model understands: a pattern that must match in full, and the same in words."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pattern: str
    description: str

    @field_validator("pattern")
    @classmethod
    def _is_a_pattern(cls, pattern: str) -> str:
        try:
            re.compile(pattern)
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern

    def knows(self, prompt: str) -> bool:
        """Whether the prompt is one that the model was trained for."""
        return re.fullmatch(self.pattern, prompt.strip(), re.IGNORECASE) is not None


class ModelNotes(BaseModel):
    """What the maker of a model folder tells penstock in `penstock.json`; every part is optional.

    Attributes:
        defaults: arguments of the pipeline's `__call__` where the request leaves them open, such as the
            picture size that the model was trained for.
        prompts: the prompts that the model understands; others run, with a note.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    defaults: dict[str, Any] = Field(default_factory=dict)
    prompts: PromptGrammar | None = None


@dataclass(frozen=True)
class ModelFolder:
    """A folder saved by diffusers.

    Attributes:
        model: the name that the user gave.
        path: where it is on this machine.
        index: its `model_index.json`: class name, and component name to [library, class].
        notes: its `penstock.json`, empty where it has none.
    """

    model: str
    path: Path
    index: dict[str, Any]
    notes: ModelNotes

    @property
    def class_name(self) -> str:
        """Name of the pipeline's class."""
        name = self.index["_class_name"]
        return str(name[-1] if isinstance(name, list) else name)

    @property
    def component_classes(self) -> dict[str, tuple[str, str]]:
        """Component name to (library, class name); absent ones are left out."""
        return {name: (value[0], value[1]) for name, value in self.index.items() if _is_component(name, value)}

    def component_path(self, name: str) -> Path:
        """The folder with a component's files."""
        return self.path / name


def _is_class_name(value: Any) -> bool:
    """A class of diffusers by name, or [file, class] for one whose code is in the folder."""
    parts = value if isinstance(value, list) and len(value) == 2 else [value]
    return all(isinstance(part, str) and part for part in parts)


def _is_component(name: str, value: Any) -> bool:
    """Whether an entry of the index is a component that is there; `[null, null]` is one that is not."""
    return (
        not name.startswith("_")
        and isinstance(value, list)
        and len(value) == 2
        and all(isinstance(part, str) for part in value)
    )


def open_folder(model: str | Path, config: SourceConfig) -> ModelFolder:
    """Find a model by name: one of `BUILT_IN`, a folder, or a hub id (downloaded into the hub's cache where needed).

    Raises:
        ModelNotFoundError: for a name that leads nowhere.
        NotAPipelineError: for a folder without a readable `model_index.json`.
        ModelError: for a `penstock.json` that cannot be read.
    """
    try:
        path = _locate(str(model), config)
    except OSError as error:  # such as a name that is too long for the file system
        raise ModelNotFoundError(
            f"{str(model)!r} cannot be a folder: {error.strerror}. Give the path of one."
        ) from error
    index = _read_json(path / _INDEX, path)
    if not isinstance(index, dict) or not _is_class_name(index.get("_class_name")):
        raise NotAPipelineError(f"{path / _INDEX}: names no pipeline class. Save the model with save_pretrained.")
    return ModelFolder(str(model), path, index, _read_notes(path / _NOTES))


def _locate(model: str, config: SourceConfig) -> Path:
    path = Path(model).expanduser()
    if not model:
        raise ModelNotFoundError(f"no model is named. Give {_NAMES}, a folder saved by diffusers, or owner/name.")
    if config.revision is not None and (model in BUILT_IN or path.exists()):
        raise ConfigError(
            f"revision={config.revision!r} is for hub models, and {model} is on this machine. Leave it out."
        )
    if model in BUILT_IN:
        return _built_in(model)
    if path.is_dir():
        return path.resolve()
    if path.suffix in _WEIGHT_FILES and path.is_file():
        raise NotAPipelineError(
            f"{model} is one file of weights, and penstock loads folders that diffusers' save_pretrained wrote. Make a "
            f"pipeline of it with the class that it belongs to, such as diffusers' "
            f"StableDiffusionXLPipeline.from_single_file({model!r}); then give it to penstock.apply, or save it with "
            "save_pretrained(FOLDER) and load the folder. An adapter (LoRA) is loaded onto a pipeline: "
            "pipe.load_lora_weights."
        )
    if path.is_file():
        raise NotAPipelineError(f"{model} is a file. Give the folder that diffusers' save_pretrained wrote.")
    if _HUB_ID.fullmatch(model) and not model.startswith("."):
        return _download(model, config)
    raise ModelNotFoundError(
        f"{model!r} is no folder and no hub id. Give {_NAMES}, a folder saved by diffusers, or owner/name."
    )


def _built_in(model: str) -> Path:
    path = Path(__file__).resolve().parents[1] / model
    if not (path / _INDEX).is_file():
        raise ModelNotFoundError(f"the built-in {model} is missing from this installation. Install penstock again.")
    return path


def _download(model: str, config: SourceConfig) -> Path:
    from diffusers import DiffusionPipeline  # heavy, and only hub ids need it

    try:
        folder = DiffusionPipeline.download(
            model,
            revision=config.revision,
            variant=config.variant,
            trust_remote_code=config.trust_remote_code,
        )
    except (OSError, ValueError) as error:
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelNotFoundError(
            f"{model!r} is no folder here, and the hub did not give it: {first} "
            "Check the name, the network and your hub login, or give a folder saved by diffusers."
        ) from error
    return Path(folder)


def _read_json(file: Path, folder: Path) -> Any:
    try:
        return json.loads(file.read_text("utf-8"))
    except FileNotFoundError:
        raise NotAPipelineError(
            f"{folder} has no {_INDEX}, so it is no diffusers pipeline. Give a folder written by save_pretrained."
        ) from None
    except (ValueError, OSError) as error:
        raise NotAPipelineError(f"{file}: not readable as JSON ({error}). Save the model again.") from error


def _read_notes(file: Path) -> ModelNotes:
    if not file.is_file():
        return ModelNotes()
    try:
        return ModelNotes.model_validate_json(file.read_text("utf-8"))
    except (ValidationError, OSError) as error:
        raise ModelError(f"{file}: not valid notes: {error}") from error
